"""Truncated SVD in a metric of gradients: what the loss minds, instead of what the inputs excite.

With the diagonal of the Fisher information in the place of the Hessian, a change Δ of the weight costs about
½ Σᵢⱼ E[(∂L/∂W)ᵢⱼ²] Δᵢⱼ².  No closed form minimises that over weights of rank r, since every entry counts differently.
The paper gives all entries of an input channel one weight and minimises

    ‖(W - W') diag(f)‖²    with    fⱼ² = mean over i of E[(∂L/∂W)ᵢⱼ²],

which is plain truncation in a diagonal metric, exact: what is left is the sum of the squares of the dropped singular
values of W diag(f) (see `linalg.truncation`).  A factor common to all of f changes nothing.

Departures from the paper: expectations are over windows of text, not over labelled examples, and the gradient of one
window at a time is squared; channels without any gradient keep a tiny weight in the metric, so that they are not
dropped without a price.  `alpha` below 1 is the variant of ASVD's authors, who dampen scales by an exponent; they also
shift labels twice, which makes theirs the gradients of predicting the token after next.

Source: Hsu et al., Language model compression with weighted low-rank factorization, 2022, section 3.2
(arXiv 2207.00112).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.factorise import leaves_as_stored, low_rank, rank_options, rank_sizes
from tersely.option import Option
from tersely.stats import Fisher, Statistic, Stats

FLOOR = 1e-6  # least square of a channel's weight, as a fraction of the mean one


@dataclass(frozen=True)
class FisherWeightedSVD:
    alpha: float = 1.0
    """Exponent of the channels' weights f (no unit), 0 (plain SVD) to 1 (the paper's)."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = (
        "Hsu et al., 2022, Language model compression with weighted low-rank factorization (arXiv 2207.00112)"
    )
    summary: ClassVar[str] = "truncated SVD after scaling input channels by the loss's gradients"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"fwsvd: alpha {self.alpha}; wanted 0 (plain SVD) to 1")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Fisher,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are ‖(W - W') diag(f^alpha)‖²: with alpha 1 twice the nats that the loss of a window is to rise by, on
        one scale for all linears of a model."""
        return rank_options(weight, output_basis(weight, self._metric(stats), vectors=False), self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        return low_rank(weight, self._metric(stats), amount, self.pivot)

    def _metric(self, stats: Stats) -> Float[Tensor, " in"]:
        """f² to the power alpha.  A weight without any gradient says nothing: all its channels count alike."""
        information = stats[Fisher].mean()
        if not information.isfinite().all():  # alpha = 0 would turn NaN into 1
            raise NumericalError("the gradients have entries that are not finite; calibrate in float32 or bfloat16")
        if not information.any():
            information = information + 1.0
        return information.clamp(min=FLOOR * information.mean().item()).pow(self.alpha)
