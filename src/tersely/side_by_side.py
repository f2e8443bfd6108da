"""Parts of one work on several threads of a processor, each computing with one.

PyTorch divides a product among threads, and waits for all of them before the next: that pays for large products only.
Parts that know nothing of each other wait once, at the end.  Python runs one thread at a time, and hands over while
PyTorch computes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from threading import Event

import torch

INTERRUPTIBLE = 0.2
"""Seconds after which an interrupt is noticed at the latest."""


@dataclass(frozen=True)
class Part:
    run: Callable[[Callable[[], bool]], None]
    """In a thread of its own, where nothing is recorded for gradients; it ends early where the function that it is
    given says no."""
    done: Callable[[], None]
    """Called where all parts have run, one after the other in their order: what it adds up does not depend on which
    was quicker."""


def ranges(count: int, parts: int) -> list[range]:
    """0 to `count` in so many parts of nearly the same length, one at least."""
    cuts = [count * part // max(parts, 1) for part in range(max(parts, 1) + 1)]
    return [range(start, end) for start, end in pairwise(cuts)]


def side_by_side(parts: Sequence[Part]) -> None:
    """Run all parts, one on a thread.  What fails in some of them is raised when all have ended, the first one's; an
    interrupt has them end early."""
    threads, interrupted = torch.get_num_threads(), Event()

    def run(part: Part) -> None:
        with torch.no_grad():
            part.run(lambda: not interrupted.is_set())

    try:
        with ThreadPoolExecutor(len(parts), "part", torch.set_num_threads, (1,)) as pool:
            try:
                running = [pool.submit(run, part) for part in parts]
                while wait(running, INTERRUPTIBLE).not_done:
                    pass  # an interrupt that comes just before a wait is not noticed until it ends
                for one in running:
                    one.result()
            except KeyboardInterrupt:
                interrupted.set()
                raise
    finally:
        torch.set_num_threads(threads)  # one library of PyTorch's has the number for all threads together
    for part in parts:
        part.done()
