"""Seconds of a whole factorisation over seconds of the bare symmetric eigenproblem that it needs.

    python tools/factorisation_cost.py [--width 2048 4096]

Beside it the route of the papers, in float64: Cholesky factor S of the Gram matrix, SVD of W S, and S⁻¹ by a triangular
solve.  All are measured in this process, alternating, and the smallest of each is taken.  Square, tall (gate and up
projections: 2.75 times as many outputs as inputs) and wide (down projections).
"""

import argparse
import time
from collections.abc import Callable

import torch

from tersely.linalg.truncation import output_basis

STRETCH = 2.75


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def by_whitening(weight: torch.Tensor, metric: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    root = torch.linalg.cholesky(metric)
    u, s, vt = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, s[:rank, None] * vt[:rank], upper=False, left=False)
    return u[:, :rank], down


def measure(rows: int, columns: int, repeats: int) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(columns, 2 * columns, generator=generator, dtype=torch.float64)
    metric = inputs @ inputs.T / (2 * columns)
    small = min(rows, columns)
    square = torch.randn(small, small, generator=generator, dtype=torch.float64)
    square = square @ square.T
    rank = int(0.8 * rows * columns / (rows + columns))
    bare, whole, papers = [], [], []
    for _ in range(repeats):
        bare.append(seconds(lambda: torch.linalg.eigh(square)))
        whole.append(seconds(lambda: output_basis(weight, metric).factors(rank)))
        papers.append(seconds(lambda: by_whitening(weight, metric, rank)))
    return min(bare), min(whole), min(papers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| weight (out × in) | eigh, s | ours, s | papers' route, s | ours / eigh | papers' / ours |")
    print("|---|--:|--:|--:|--:|--:|")
    for width in asked.width:
        long = int(STRETCH * width)
        for rows, columns in ((width, width), (long, width), (width, long)):
            bare, whole, papers = measure(rows, columns, asked.repeats)
            ratios = f"{whole / bare:.2f} | {papers / whole:.1f}"
            print(f"| {rows} × {columns} | {bare:.2f} | {whole:.2f} | {papers:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
