"""What it takes to factorise one decoder block of Llama-3-8B shape, three ways in one run.

    python tools/block_cost.py [--keep 0.8] [--power 2] [--tokens 16384] [--small 1]

Weights are random with a spectrum that decays as i^-0.5; inputs are random, correlated by 256 common factors, and their
Gram matrices are real sums over `tokens` of them.  For every one of the seven linears, seconds and the error that is
left:

    papers      Cholesky factor of the Gram matrix and its explicit inverse in float64, full torch.linalg.svd of W S in
                float32, factors from it: what the code of the papers does for every linear anew
    exact       `linalg.truncation.output_basis`: one symmetric eigenproblem of the smaller side, no root, no inverse
    randomised  `linalg.randomised.leading_basis`, with so many power iterations; its error over the optimal one is
                given, computed from the factors and the Gram matrix

Peak memory is that of the process, weight and Gram matrix included.  `--small` divides all widths, to try it out.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersely.evaluation import peak_within
from tersely.linalg.randomised import leading_basis
from tersely.linalg.truncation import output_basis

# name → (out, in, input it reads), Llama-3-8B
LINEARS = {
    "q": (4096, 4096, "attention"),
    "k": (1024, 4096, "attention"),
    "v": (1024, 4096, "attention"),
    "o": (4096, 4096, "mixed"),
    "gate": (14336, 4096, "mlp"),
    "up": (14336, 4096, "mlp"),
    "down": (4096, 14336, "activated"),
}
BLOCKS = 32
FACTORS = 256


def weight_of(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random weight whose singular values fall as i^-0.5, up to randomness."""
    inner = min(rows, columns)
    falling = torch.arange(1, inner + 1).float() ** -0.5
    left = torch.randn(rows, inner, generator=generator) * falling
    return left @ torch.randn(inner, columns, generator=generator) / inner**0.5


def gram_of(width: int, tokens: int, generator: torch.Generator) -> Tensor:
    """E[x xᵀ] over random inputs with common factors and channels of unequal size, float64."""
    mixing = torch.randn(FACTORS, width, generator=generator) / FACTORS**0.5
    loudness = torch.exp(0.5 * torch.randn(width, generator=generator))
    total = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, tokens, 4096):
        count = min(4096, tokens - start)
        common = torch.randn(count, FACTORS, generator=generator) @ mixing
        x = (common + 0.3 * torch.randn(count, width, generator=generator)) * loudness
        total += x.T @ x
    return total / tokens


def papers(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root = torch.linalg.cholesky(gram)
    inverse = torch.linalg.inv(root)
    u, s, vh = torch.linalg.svd(weight @ root.float(), full_matrices=False)
    half = s[:rank].sqrt()
    return u[:, :rank] * half, (half[:, None] * vh[:rank]) @ inverse.float()


def exact(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return output_basis(weight, gram, rank=rank).factors(rank)


def leading(power: int, weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return leading_basis(weight, gram, rank, power).factors(rank)


def timed(work: Callable[..., tuple[Tensor, Tensor]], *given: Any) -> tuple[float, Tensor, Tensor]:
    begun = time.perf_counter()
    up, down = work(*given)
    return time.perf_counter() - begun, up, down


def left(weight: Tensor, up: Tensor, down: Tensor, gram: Tensor) -> float:
    """tr(Δ G Δᵀ) / tr(W G Wᵀ), in float32 products."""
    difference, felt = weight - up.float() @ down.float(), gram.float()
    lost = ((difference @ felt) * difference).sum(dtype=torch.float64)
    return (lost / ((weight @ felt) * weight).sum(dtype=torch.float64)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--power", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--small", type=int, default=1)
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    ways = {"papers": papers, "exact": exact, "randomised": partial(leading, asked.power)}
    total, highest = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    grams: dict[str, Tensor] = {}
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, torch {torch.__version__}\n")
    heads = ["linear (out × in)", "rank", *(f"{way}, s" for way in ways), "papers / exact", "papers / randomised"]
    print("| " + " | ".join([*heads, "error, exact", "error, randomised / exact"]) + " |")
    print("|---|" + "--:|" * 8)
    for name, (rows, columns, reads) in LINEARS.items():
        rows, columns = rows // asked.small, columns // asked.small
        if reads not in grams:
            grams = {reads: gram_of(columns, asked.tokens, generator)}
        weight = weight_of(rows, columns, generator)
        rank = int(asked.keep * rows * columns / (rows + columns))
        seconds, errors = {}, {}
        for way, work in ways.items():
            with peak_within() as peak:
                seconds[way], up, down = timed(work, weight, grams[reads], rank)
            highest[way] = max(highest[way], peak.highest or 0)
            errors[way] = left(weight, up, down, grams[reads])
            total[way] += seconds[way]
        cells = [f"{seconds[way]:.2f}" for way in ways]
        cells += [f"{seconds['papers'] / seconds[way]:.2f}" for way in ("exact", "randomised")]
        cells += [f"{errors['exact']:.6f}", f"{errors['randomised'] / errors['exact']:.5f}"]
        print(f"| {name} ({rows} × {columns}) | {rank} | " + " | ".join(cells) + " |", flush=True)
    cells = [f"{total[way]:.1f}" for way in ways]
    cells += [f"{total['papers'] / total[way]:.2f}" for way in ("exact", "randomised")]
    print("| **block** | | " + " | ".join(cells) + " | | |\n")
    for way in ways:
        minutes = f"{BLOCKS} such blocks on paper: {BLOCKS * total[way] / 60:.0f} minutes"
        print(f"{way}: peak resident memory {highest[way] / 1e9:.2f} GB; {minutes}")


if __name__ == "__main__":
    main()
