r"""Every kernel beside its reference in PyTorch, in turns, the fastest of each.

    python tools/kernel_speed.py [--threads 1 2] [--rounds 7] [--out F.md]

Random numbers, in shapes of small and of large models; whole calls, with all that happens before and after the C++.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tersely.journal import commit_text
from tersely.kernels import causal_attention, linear, reference_only
from tersely.linalg.grid import fit_grid
from tersely.linalg.hessian import feedback
from tersely.methods.quantize.gptq import rounded_with_feedback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="a table for each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a Markdown file that gets the tables, too")
    given = parser.parse_args()
    lines = [f"Regenerate with `{shlex.join(['python', 'tools/kernel_speed.py', *sys.argv[1:]])}`."]
    for threads in given.threads:
        torch.set_num_threads(threads)
        lines += ["", f"Threads: {threads}; torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}.", ""]
        lines += ["| operation | shape | reference, ms | kernel, ms | times as fast |", "|---|---|--:|--:|--:|"]
        for operation, shape, run in cases():
            reference, kernel = fastest(run, given.rounds)
            lines.append(f"| {operation} | {shape} | {reference:.2f} | {kernel:.2f} | {reference / kernel:.2f} |")
            sys.stderr.write(lines[-1] + "\n")
    print("\n".join(lines))
    if given.out is not None:
        commit_text(given.out, "\n".join(lines) + "\n")


def cases() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Name, shape and call; what is random comes from one seed."""
    numbers = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers)

    for out, width in ((128, 128), (384, 128), (1024, 1024), (4096, 4096)):
        x = normal(2 * width, width) @ normal(width, width)
        weight, spread = normal(out, width), feedback(x.T @ x, damping=0.01, loudest_first=True)
        grid = fit_grid(weight, 4, 64)
        yield "error feedback, 4 bits", f"{out} × {width}", partial(rounded_with_feedback, weight, grid, spread)
    for out, width in ((128, 128), (384, 128), (1024, 1024), (2048, 4096)):
        yield "search for ranges", f"{out} × {width}", partial(fit_grid, normal(out, width), 4, 64, shrink=True)
    for batch, length, heads, shared, width in ((8, 256, 4, 2, 32), (4, 512, 12, 12, 64), (1, 2048, 8, 2, 128)):
        read = normal(batch, length, heads + 2 * shared, width).transpose(1, 2)
        query, key, value = read.split((heads, shared, shared), 1)
        call = partial(causal_attention, query, key, value, is_causal=True, enable_gqa=True)
        yield "causal attention", f"{batch} × {length} tokens, {heads} heads of {width} over {shared}", call
    for tokens, out, width in ((2048, 128, 128), (2048, 384, 128), (2048, 4096, 1024)):
        call = partial(linear, normal(tokens, width), normal(out, width))
        yield "linear", f"{tokens} tokens, {out} × {width}", call


@torch.no_grad()
def fastest(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds of the reference and of the kernel."""
    best = [float("inf"), float("inf")]
    for _ in range(rounds + 1):  # the first one builds and warms up
        with reference_only():
            best[0] = min(best[0], timed(run))
        best[1] = min(best[1], timed(run))
    return best[0], best[1]


def timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
