"""Parts of one work on several threads of a processor, each computing with one.

PyTorch divides a product among threads, and waits for all of them before the next: that pays for large products only.
Parts that know nothing of each other wait once, at the end.  Python runs one thread at a time, and hands over while
PyTorch computes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    run: Callable[[], None]
    """In a thread of its own, where nothing is recorded for gradients."""
    done: Callable[[], None]
    """Called where all parts have run, one after the other in their order: what it adds up does not depend on which
    was quicker."""


def side_by_side(parts: Sequence[Part]) -> None:
    """Run all parts, one on a thread.  What fails in some of them is raised when all have ended, the first one's."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(parts), "part", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(torch.no_grad()(_run), parts):
                pass
    finally:
        torch.set_num_threads(threads)  # one library of PyTorch's has the number for all threads together
    for part in parts:
        part.done()


def _run(part: Part) -> None:
    part.run()
