"""ASVD: scale each input channel by how loud it is before truncating, and undo the scaling afterwards.

With s_j the mean (or largest) |x_j| over calibration and S = diag(s^alpha), minimises ‖(W - W') S‖² over W' of rank r:
truncated SVD with a diagonal metric.  alpha = 0 is plain SVD.

Departures from the authors' code: the truncation is exact, where theirs is randomised without oversampling; silent
channels are kept from zero by a floor relative to the mean scale, where theirs adds an absolute 1e-6, so that the
result does not depend on the scale of the activations; the undone scaling never appears, since W' = U_r U_rᵀ W needs no
inverse.  Their rank search is an allocator, not part of this file.

Source: Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models, 2023,
section 3 (arXiv 2312.05821).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.factorise import leaves_as_stored, low_rank, rank_options, rank_sizes
from tersely.option import Option
from tersely.stats import AbsMax, AbsMean, Statistic, Stats

FLOOR = 1e-6  # smallest channel scale, as a fraction of the mean one: the authors' 1e-6, made relative


@dataclass(frozen=True)
class ChannelScaledSVD:
    alpha: float = 0.5
    """Exponent of the channel scale (no unit), 0 to 1; 0.5 is the paper's."""

    scale: Literal["mean", "max"] = "mean"
    """What is measured per channel: mean |x| (the paper's choice) or the largest |x|."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = "Yuan et al., 2023, ASVD: Activation-aware Singular Value Decomposition (arXiv 2312.05821)"
    summary: ClassVar[str] = "truncated SVD after scaling input channels by their activations"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"asvd: alpha {self.alpha}; wanted 0 (plain SVD) to 1")
        if self.scale not in ("mean", "max"):
            raise RecipeError(f"asvd: scale {self.scale!r}; wanted 'mean' or 'max'")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (AbsMax if self.scale == "max" else AbsMean,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        return rank_options(weight, output_basis(weight, self._metric(stats), vectors=False), self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        return low_rank(weight, self._metric(stats), amount, self.pivot)

    def _metric(self, stats: Stats) -> Float[Tensor, " in"]:
        """S², the diagonal metric.  An input that was silent throughout says nothing: all its channels count alike."""
        (needed,) = self.needs
        scale = stats[needed].mean()
        if not scale.isfinite().all():  # alpha = 0 would turn NaN into 1
            raise NumericalError(
                "the input statistic has entries that are not finite; calibrate in float32 or bfloat16"
            )
        if not scale.any():
            scale = scale + 1.0
        return scale.clamp(min=FLOOR * scale.mean().item()).pow(2 * self.alpha)
