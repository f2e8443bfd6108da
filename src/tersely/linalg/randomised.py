"""The leading part of a truncation by random projection, where the whole eigenproblem is too dear.

`truncation.output_basis` solves the eigenproblem of C = W M Wᵀ whole, though rank r needs its r leading vectors only.
A random block of k = r + oversampling columns, multiplied by C again and again, turns towards them: a direction of
eigenvalue λ_i grows by λ_i at every product, so that after q of them the span misses the r-th by about
(λ_{k+1} / λ_r)^q.  Then the eigenproblem of Qᵀ C Q, k x k, picks the best r directions of the span (Rayleigh and Ritz).

All repeated products are on the smaller side of the weight.  Where it is wide that is C itself.  Where it is tall, an
eigenvector of C is u = W z with  M B z = λ z,  B = Wᵀ W,  so the block is turned by M B and multiplied by W once, at
the end.  Between products the block is kept from collapsing by the lower factor of its LU decomposition, which spans
the same and takes a fraction of a QR.

Products are in float32, which is what makes this fast: relative to the largest eigenvalue, directions below 1e-7 are
noise, as they are to weights of 16 bits.  The small eigenproblems are in float64.

What is lost is known, not hoped: with U orthonormal the truncation W' = U Uᵀ W leaves exactly tr(C) - tr(Uᵀ C U), both
of which are at hand, to about 1e-6 of tr(C).  The columns are drawn from a generator of its own, so that equal inputs
give equal results.

Source: Halko, Martinsson and Tropp, Finding Structure with Randomness: Probabilistic Algorithms for Constructing
Approximate Matrix Decompositions, SIAM Review 53, 2011, algorithms 4.4 and 5.3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError
from tersely.linalg.truncation import balanced, covariance_of_outputs, tails

OVERSAMPLING = 0.05
"""Columns beyond the rank, as a share of it; 16 at least."""

JITTER = 1e-7
"""Added to the diagonal of what is to be rooted, as a share of its mean: float32 knows no less."""


@dataclass(frozen=True)
class LeadingBasis:
    """About the leading eigenvectors of W M Wᵀ, by falling energy."""

    energy: Float[Tensor, " known"]
    """float64"""
    up: Float[Tensor, "out known"]
    """The vectors U, orthonormal, float32."""
    down: Float[Tensor, "known in"]
    """Uᵀ W, float32."""
    behind: float
    """The energy of all others."""

    def left_over(self) -> Float[Tensor, " known_plus_one"]:
        """Error left at rank 0, 1, ..., as many as are known, to about 1e-6 of the whole."""
        return tails(self.energy) + self.behind

    def factors(self, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """(up, down) with up · down = U_r U_rᵀ W, balanced, as those of `truncation.OutputBasis`."""
        return balanced(self.up[:, :rank], self.down[:rank])


def leading_basis(
    weight: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | None, rank: int, power: int, seed: int = 0
) -> LeadingBasis:
    """About the `rank` leading eigenvectors of W M Wᵀ after 1 + `power` products with it.

    Raises NumericalError for entries that are not finite.
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
    find = _of_tall if rows > columns else _of_wide
    energy, up, down, whole = find(scaled, felt, block, rank, power)
    unit = sizes[0] ** 2 * sizes[1]
    behind = (whole - energy.sum()).clamp(min=0).item() * unit
    return LeadingBasis(energy * unit, up, down * sizes[0], behind)


Found = tuple[Tensor, Tensor, Tensor, Tensor]
"""Energies, U, Uᵀ W and tr(C)."""


def _of_wide(weight: Tensor, metric: Tensor | None, block: Tensor, rank: int, power: int) -> Found:
    covariance = covariance_of_outputs(weight, metric)
    for number in range(power + 1):
        block = covariance @ (_spread(block) if number else block)
    span = torch.linalg.qr(block).Q
    energy, directions = _falling(span.T @ covariance @ span, rank)
    up = span @ directions.float()
    return energy, up, up.T @ weight, covariance.diagonal().sum(dtype=torch.float64)


def _of_tall(weight: Tensor, metric: Tensor | None, block: Tensor, rank: int, power: int) -> Found:
    inner = weight.T @ weight

    def turned(block: Tensor) -> Tensor:
        return inner @ block if metric is None else metric @ (inner @ block)

    for number in range(power + 1):
        block = turned(_spread(block) if number else block)
    span = torch.linalg.qr(block).Q
    # W times this is orthonormal
    span = _divided(span, span.T @ (inner @ span))
    reached = inner @ span
    energy, directions = _falling(reached.T @ (reached if metric is None else metric @ reached), rank)
    span = span @ directions.float()
    up = weight @ span
    # what float32 left of the orthonormality, once more
    close = up.T @ up
    up, span = _divided(up, close), _divided(span, close)
    whole = inner.diagonal().sum(dtype=torch.float64) if metric is None else (inner * metric).sum(dtype=torch.float64)
    return energy, up, span.T @ inner, whole


def _spread(block: Float[Tensor, "side width"]) -> Float[Tensor, "side width"]:
    """Columns that span the same and are far from dependent."""
    permutation, lower, _ = torch.linalg.lu(block)
    spread: Tensor = permutation @ lower
    return spread


def _divided(block: Float[Tensor, "side width"], gram: Float[Tensor, "width width"]) -> Float[Tensor, "side width"]:
    """block · L⁻ᵀ with gram = L Lᵀ."""
    gram = (gram.double() + gram.double().T) / 2
    gram.diagonal().add_(JITTER * (gram.diagonal().mean().item() or 1.0))
    root = torch.linalg.cholesky(gram).float()
    divided: Tensor = torch.linalg.solve_triangular(root.T, block, upper=True, left=False)
    return divided


def _falling(small: Float[Tensor, "width width"], rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues and eigenvectors, float64."""
    energy, directions = torch.linalg.eigh((small.double() + small.double().T) / 2)
    return energy.flip(0)[:rank].clamp(min=0), directions.flip(1)[:, :rank]


def _size(matrix: Float[Tensor, "rows columns"]) -> float:
    """Its largest entry, 1 where all are zero."""
    return matrix.abs().max().item() or 1.0
