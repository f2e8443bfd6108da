"""Whitened truncation that also says which way the loss will move.

The truncation is that of `svd_llm`: W' = U_r U_rᵀ W with U the eigenvectors of W E[x xᵀ] Wᵀ.  What it leaves behind
says how far outputs move, and is never negative.  The loss of a trained model may move either way: with D the gradient
of the mean loss in the weight, dropping component i, which changes the weight by -u_i u_iᵀ W, moves the loss to first
order by

    δ_i = -⟨D, u_i u_iᵀ W⟩ = -u_iᵀ D Wᵀ u_i     (nats per token).

The authors whiten, W L = U Σ Vᵀ with L Lᵀ = E[x xᵀ], map the gradient into the same coordinates, H = D L⁻ᵀ, and find
δ_i = -σ_i (Uᵀ H V)_ii.  Since σ_i v_iᵀ L⁻¹ = u_iᵀ W, the two are equal, and ours inverts nothing.  For a tall weight
U = Q V with W = Q R, and δ_i = -v_iᵀ (Qᵀ D) Rᵀ v_i.

The drift of rank r is Σ_{i>r} δ_i.  The allocator `zero_sum` drops components over all weights so that rises and falls
cancel; the errors of outputs that this method predicts as well serve every other allocator.

With `second_order`, ½ δ_i² is added to every δ_i: the curvature along the component, if the Hessian were the square of
the mean gradient.

Departures: the authors truncate in about six stages, and between them project what was removed onto the span of a few
calibration gradients, add that, and truncate again.  This is not done here: it takes a backward pass through the cut
model after each stage, and statistics here are those of the dense model.  Their 8-bit storage of factors is another
step.

Source: Abbasi et al., Zero Sum SVD: Balancing Loss Sensitivity for Low Rank LLM Compression, 2026 (arXiv 2602.02848).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError
from tersely.kinds import LinearKind
from tersely.linalg.truncation import OutputBasis, output_basis
from tersely.methods.low_rank.factorise import (
    check_damping,
    damped_gram,
    leaves_as_stored,
    low_rank,
    rank_options,
    rank_sizes,
)
from tersely.option import Option
from tersely.stats import Gram, MeanGradient, Statistic, Stats


@dataclass(frozen=True)
class ZeroSumSVD:
    damping: float = 1e-6
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    second_order: bool = False
    """Add half the square of every component's first-order change to it."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = (
        "Abbasi et al., 2026, Zero Sum SVD: Balancing Loss Sensitivity for Low Rank LLM Compression (arXiv 2602.02848)"
    )
    summary: ClassVar[str] = "whitened truncation that predicts the signed change of the loss, for zero_sum"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        check_damping("zs_svd", self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram, MeanGradient)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact without damping; with it they are upper bounds, by at most damping · power · ‖W - W'‖².
        Drifts are nats per token, of all components that a rank drops."""
        basis = output_basis(weight, damped_gram(stats, self.damping))
        moved = changes(basis, stats[MeanGradient].mean().view(weight.shape))
        if self.second_order:
            moved = moved + moved.square() / 2
        if not torch.isfinite(moved).all():
            raise NumericalError("the gradients have entries that are not finite; calibrate in float32 or bfloat16")
        drift = [*moved.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        return [replace(option, drift=drift[option.amount]) for option in rank_options(weight, basis, self.pivot)]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        if not torch.isfinite(stats[MeanGradient].mean()).all():
            raise NumericalError("the gradients have entries that are not finite; calibrate in float32 or bfloat16")
        return low_rank(weight, damped_gram(stats, self.damping), amount, self.pivot)


def changes(basis: OutputBasis, gradient: Float[Tensor, "out in"]) -> Float[Tensor, " k"]:
    """-u_iᵀ D Wᵀ u_i for every vector of a basis of W: what dropping it does to the loss, to first order."""
    assert basis.vectors is not None  # a basis without vectors has no components to drop
    felt = gradient.double()
    if basis.reflectors is not None:
        reflectors, scales = basis.reflectors
        felt = torch.ormqr(reflectors, scales, felt, transpose=True)[: len(basis.core)]
    return -((basis.vectors.T @ felt) * (basis.vectors.T @ basis.core)).sum(1)
