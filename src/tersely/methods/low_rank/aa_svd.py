"""Anchored SVD: the dense output, given back from the input that really arrives.

Behind compressed blocks a linear reads x̂ where the dense model would have fed it x.  Whitening with the dense inputs
ignores that; whitening with the shifted ones fits W x̂, which nobody wants.  Anchored, the target is the dense output:

    minimise E‖W x - W' x̂‖²  over W' of rank r.

Without a bound on the rank the minimiser is W* = W C Ĝ⁻¹, with C = E[x x̂ᵀ] and Ĝ = E[x̂ x̂ᵀ]; what any W' adds to that
least error is tr((W* - W') Ĝ (W* - W')ᵀ).  So W' is the truncation of W* in the metric of Ĝ, which needs no root of it
(see `linalg.truncation`).  `anchor` mixes the two inputs that the target may be taken at, W (x̂ + anchor · (x - x̂)): 1
is the anchored problem, 0 whitening with the shifted inputs; values between are the self-adaptive mix of Hu et al.
(SAES-SVD, 2026, arXiv 2602.03051) with a fixed share.

On dense inputs, as in the sweep that makes the plan, C = Ĝ and W* = W, to the bit: the curve is that of whitening.
Fitting W* takes an inverse that whitening does not, hence a larger damping: directions that calibration hardly excites
would otherwise be blown up.  The authors' refinement of whole blocks by gradient descent is a training step of its own.

Source: Kumar et al., AA-SVD: Anchored and Adaptive SVD for Large Language Model Compression, 2026, section 3
(arXiv 2604.02119).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.factorise import (
    check_damping,
    damped_gram,
    leaves_as_stored,
    low_rank,
    rank_options,
    rank_sizes,
)
from tersely.option import Option
from tersely.stats import Cross, Drift, Gram, Statistic, Stats


@dataclass(frozen=True)
class AnchoredSVD:
    anchor: float = 1.0
    """Share of the dense input in the target, 0 (none: W x̂) to 1 (all: W x)."""

    damping: float = 1e-3
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = "Kumar et al., 2026, AA-SVD: Anchored and Adaptive SVD (arXiv 2604.02119)"
    summary: ClassVar[str] = "truncation that gives back the dense output from the shifted input"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        if not 0 <= self.anchor <= 1:
            raise RecipeError(f"aa_svd: anchor {self.anchor}; wanted 0 to 1")
        check_damping("aa_svd", self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram, Cross)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are what truncation adds to the least possible error, in the damped metric."""
        wanted = self._best(weight, stats)
        return rank_options(weight, output_basis(wanted, self._metric(stats), vectors=False), self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        return low_rank(self._best(weight, stats), self._metric(stats), amount, self.pivot).to(weight.dtype)

    def _metric(self, stats: Stats) -> Float[Tensor, "in in"]:
        return damped_gram(stats, self.damping)

    def _best(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return anchored_target("aa_svd", weight, stats, self.anchor, self.damping)


def anchored_target(
    method: str, weight: Float[Tensor, "out in"], stats: Stats, anchor: float, damping: float, residual: float = 0.0
) -> Float[Tensor, "out in"]:
    """W*, float64: what reads the shifted input and comes closest to W (x̂ + anchor · (x - x̂)), plus residual · (h - ĥ)
    where the output is added to the residual stream.  The weight itself where nothing has been shifted.

    The damping pulls it towards W, not towards zero.  Raises NumericalError, which names the method, where it does not
    suffice.
    """
    shift = anchor * stats[Cross].mean()
    drift = residual * stats[Drift].mean() if residual and Drift in stats else shift[:0]
    if not shift.any() and not drift.any():
        return weight
    root, failed = torch.linalg.cholesky_ex(damped_gram(stats, damping))
    if failed:
        raise NumericalError(
            f"{method}: the damped Gram matrix of {stats[Gram].tokens} tokens is not positive definite; raise damping"
        )
    missing = weight.double() @ shift
    if len(drift):  # of what writes to the stream
        missing += drift
    moved = torch.cholesky_solve(missing.T, root).T
    return weight.double() + moved
