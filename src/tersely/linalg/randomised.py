"""The leading part of a truncation by random projection, where the whole eigenproblem is too dear.

`truncation.output_basis` solves the eigenproblem of C = W M Wᵀ whole, though rank r needs its r leading vectors only.
A random block of k = r + oversampling columns, multiplied by C again and again, turns towards them: a direction of
eigenvalue λ_i grows by λ_i at every product, so that after q of them the span misses the r-th by about
(λ_{k+1} / λ_r)^q.  Then the eigenproblem of Qᵀ C Q, k x k, picks the best r directions of the span (Rayleigh and Ritz).

All repeated products are on the smaller side of the weight.  Where it is wide that is C itself.  Where it is tall, an
eigenvector of C is u = W z with  M Wᵀ W z = λ z,  so the block is turned by  M (Wᵀ W)  and multiplied by W once, at the
end.

Products are in float32, which is what makes this fast: relative to the largest eigenvalue, directions below 1e-7 are
noise, as they are to weights of 16 bits.  The small eigenproblem is in float64.

What is lost is known, not hoped: with U orthonormal the truncation W' = U Uᵀ W leaves exactly tr(C) - tr(Uᵀ C U), both
of which are at hand, to about 1e-6 of tr(C).  The columns are drawn from a generator of its own, so that equal inputs
give equal results.

Source: Halko, Martinsson and Tropp, Finding Structure with Randomness: Probabilistic Algorithms for Constructing
Approximate Matrix Decompositions, SIAM Review 53, 2011, algorithms 4.4 and 5.3.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError
from tersely.linalg.truncation import OutputBasis, covariance_of_outputs

OVERSAMPLING = 0.05
"""Columns beyond the rank, as a share of it; 16 at least."""


def leading_basis(
    weight: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | None, rank: int, power: int, seed: int = 0
) -> OutputBasis:
    """About the `rank` leading eigenvectors of W M Wᵀ after 1 + `power` products with it.

    `left_over` tells the error of every rank up to `rank`, to about 1e-6 of the whole.  Raises NumericalError for
    entries that are not finite.
    """
    for name, part in (("weight", weight), ("input statistic", metric)):
        if part is not None and not torch.isfinite(part).all():
            raise NumericalError(f"the {name} has entries that are not finite; repair it before compressing")
    rows, columns = weight.shape
    width = min(rank + max(16, round(OVERSAMPLING * rank)), rows, columns)
    # scales far from 1 would leave float32; no truncation depends on them
    sizes = _size(weight), 1.0 if metric is None else _size(metric)
    scaled = (weight.to(torch.promote_types(weight.dtype, torch.float32)) / sizes[0]).float()
    felt = None if metric is None else (metric / sizes[1]).float()
    generator = torch.Generator(weight.device).manual_seed(seed)
    block = torch.randn(min(rows, columns), width, generator=generator, device=weight.device)
    if rows > columns:
        inner = scaled.T @ scaled
        for _ in range(power + 1):
            block = inner @ torch.linalg.qr(block).Q
            block = block if felt is None else felt @ block
        span = torch.linalg.qr(scaled @ torch.linalg.qr(block).Q).Q
        reached = span.T @ scaled
        small = reached @ (reached.T if felt is None else felt @ reached.T)
        whole = inner.trace() if felt is None else (inner * felt).sum(dtype=torch.float64)
    else:
        covariance = covariance_of_outputs(scaled, felt)
        for _ in range(power + 1):
            block = covariance @ torch.linalg.qr(block).Q
        span = torch.linalg.qr(block).Q
        small = span.T @ covariance @ span
        whole = covariance.diagonal().sum(dtype=torch.float64)
    energy, directions = torch.linalg.eigh((small.double() + small.T.double()) / 2)
    energy, directions = energy.flip(0)[:rank].clamp(min=0), directions.flip(1)[:, :rank]
    unit = sizes[0] ** 2 * sizes[1]
    behind = (whole.double() - energy.sum()).clamp(min=0).item() * unit
    return OutputBasis(energy * unit, span.double() @ directions, weight.double(), None, behind)


def _size(matrix: Float[Tensor, "rows columns"]) -> float:
    """Its largest entry, 1 where all are zero."""
    return matrix.abs().max().item() or 1.0
