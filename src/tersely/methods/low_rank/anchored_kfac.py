"""Anchored truncation in two metrics: the dense output, from the input that really arrives, as far as the loss minds.

Two systems look at two halves of one problem.  Anchored SVD (`aa_svd`) asks for the right thing, the output W x of the
dense model from the shifted input x̂, and counts all outputs alike.  Two-sided SVD (`kfac_svd`) counts an error by what
the loss makes of it, tr(R Δ G Δᵀ) with R = E[g gᵀ], and takes the dense model's inputs for those that arrive.  Both:

    minimise  E‖L_Rᵀ (W y - W' x̂)‖²  over W' of rank r,   y = x̂ + anchor · (x - x̂),   R = L_R L_Rᵀ.

Without a bound on the rank the minimiser is W* = W E[y x̂ᵀ] Ĝ⁻¹ whatever R is: each output has a least squares problem
of its own, and R only says which of them matter once not all can be had.  What W' adds to that least error is
‖L_Rᵀ (W* - W') Ĝ^½‖².  So W' is the truncation of W* in the metrics of R and of Ĝ, one symmetric eigenproblem of the
smaller side, and neither Ĝ nor its root is inverted for it.

R is that of the dense model, the one whose loss is to be kept.  Ĝ is shrunk as in `kfac_svd` where it measures errors;
W* takes an inverse, and only as much damping as keeps it finite.  On dense inputs, as in the sweep that makes the plan,
W* = W and the curve is that of `kfac_svd`: errors are predicted increases of the loss.

A linear that writes to the residual stream adds to it, and what counts is the sum.  Behind compressed linears the
stream is ĥ where the dense model has h.  With `residual` such a linear makes up for the difference as well, as far as
its input knows of it:

    y' = W y + residual · (h - ĥ),   W* = E[y' x̂ᵀ] Ĝ⁻¹ = W E[y x̂ᵀ] Ĝ⁻¹ + residual · E[(h - ĥ) x̂ᵀ] Ĝ⁻¹.

At 1, and with an anchor of 1, the least squares problem is that of the dense stream itself; every linear then repairs
what all those before it have left.

This combination is tersely's own; neither paper has it, nor the stream.  At equal bytes it was ahead of both at every
size on the models that were measured (docs/lab.md).

Source: Kumar et al., AA-SVD: Anchored and Adaptive SVD for Large Language Model Compression, 2026, section 3
(arXiv 2604.02119); Thoma et al., Advancing SVD-based LLM Compression via Layer-Wise Error Model Search, 2026 (ICML).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kinds import LinearKind
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.aa_svd import anchored_target
from tersely.methods.low_rank.factorise import check_damping, leaves_as_stored, rank_options, rank_sizes
from tersely.methods.low_rank.kfac_svd import felt_root, shrunk, two_sided
from tersely.option import Option
from tersely.stats import Cross, Drift, Gram, OutputGram, Statistic, Stats


@dataclass(frozen=True)
class AnchoredTwoSidedSVD:
    anchor: float = 0.5
    """Share of the dense input in the target, 0 (none: W x̂) to 1 (all: W x)."""

    residual: float = 0.0
    """Share of the drift of the residual stream that what writes to it makes up for, 0 (none) to 1 (all); wants
    propagate "input", and above 0 the statistic `drift`."""

    shrink_inputs: float = 0.1
    """How much of the Gram matrix of the inputs gives way to a multiple of the identity, 0 to 1 (no unit)."""

    shrink_gradients: float = 0.3
    """The same of the Gram matrix of the gradients in the outputs; at 1 all outputs count alike."""

    damping: float = 1e-3
    """Added to the diagonal of the Gram matrix where it is inverted, as a fraction of the mean input power (no
    unit)."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = (
        "Kumar et al., 2026, AA-SVD (arXiv 2604.02119) under the error of Thoma et al., 2026, KFAC-SVD (ICML)"
    )
    summary: ClassVar[str] = "the dense output from the shifted input, errors counted by what the loss makes of them"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        for name in ("anchor", "residual", "shrink_inputs", "shrink_gradients"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"anchored_kfac: {name} {getattr(self, name)}; wanted 0 to 1")
        check_damping("anchored_kfac", self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram, Cross, OutputGram, *((Drift,) if self.residual else ()))

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are what truncation adds to the least possible one, tr(R Δ Ĝ Δᵀ) in the shrunk metrics: twice the
        nats that the loss is to rise by per token."""
        wanted = self._wanted(weight, stats)
        turned = felt_root(stats, self.shrink_gradients).T @ wanted.double()
        return rank_options(weight, output_basis(turned, self._metric(stats), vectors=False), self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        root = felt_root(stats, self.shrink_gradients)
        made = two_sided(self._wanted(weight, stats), root, self._metric(stats), amount, self.pivot)
        return made.to(weight.dtype)

    def _wanted(self, weight: Float[Tensor, "out in"], stats: Stats) -> Float[Tensor, "out in"]:
        return anchored_target("anchored_kfac", weight, stats, self.anchor, self.damping, self.residual)

    def _metric(self, stats: Stats) -> Float[Tensor, "in in"]:
        return shrunk(stats[Gram].mean(), self.shrink_inputs)
