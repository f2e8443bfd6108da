"""GWQ: the weights that the loss feels most stay in 16 bits, all others are rounded.

One backward pass over a little text gives D = ∂L/∂W window by window, and the ⌈r · out · in⌉ entries of a linear with
the largest root mean square of it over the windows, √E[D²], are its outliers: of a single window, the paper's claim,
that is |D|; of several, squares are added up and not gradients, which cancel at the end of training.  The grid is
fitted without the outliers (`methods.quantize.outliers`), and everything else is rounded to nearest, or with error
feedback in the metric of the inputs, in which outliers, exact as they are, have no part.

What makes an outlier is a choice, so that the paper's comparisons are options of one method:

    gradient    √E[D²]                 what the loss feels, whatever rounding does there
    fisher      E[D²] (w - w')²        twice the loss that rounding this entry is to cost, to second order; w' is its
                                       nearest level on a grid that spans everything (as SqueezeLLM's sensitivity)
    gain        Σ E[D²] (w - w')²       of a group, how much of it goes when this weight is left out of its grid: what a
                                       weight costs as an outlier's neighbour counts as well
    magnitude   |w|                    data-free
    wanda       |w| · √E[x²]           its part in the output
    random      a number drawn         the control

The gradient alone does not ask what rounding takes from a weight, and most of what an outlier of a small group costs is
the range that its neighbours have to share with it: on the reference model "gradient" and "fisher" are little better
than "random", "magnitude" is, and "gain" is the best of them with rounding to nearest (docs/lab.md).

With r = 0 this is `rtn` (or `gptq`) bit for bit; with r = 1 every weight is one of 16 bits.

Departures, and readings where the paper's text is not at hand: the share is kept in every linear alike; the mean of a
group stands in no masked place, since zero lies in every range already and the grid comes out the same; scales have 16
bits and no second level.  Bytes count values, columns and row counts of the outliers.

Source: Shao et al., GWQ: Gradient-Aware Weight Quantization for Large Language Models, 2024 (arXiv 2411.00850).
Source: Kim et al., SqueezeLLM: Dense-and-Sparse Quantization, 2023, section 4 (arXiv 2306.07629), for "fisher".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError, unknown
from tersely.kinds import LinearKind
from tersely.linalg.grid import Form, fit_grid, wide
from tersely.methods.quantize.outliers import (
    check_outliers,
    largest,
    left_out,
    metric_of,
    outlier_bytes,
    outlier_count,
    spread_of,
    swept,
    with_outliers,
)
from tersely.methods.quantize.widths import WIDTHS, StoredScale, check_grid, check_scale, sizes_of, width_of
from tersely.option import Option
from tersely.stats import DiagonalFisher, Gram, Power, Statistic, Stats

SCORES: dict[str, tuple[type[Statistic], ...]] = {
    "gradient": (DiagonalFisher,),
    "fisher": (DiagonalFisher,),
    "gain": (DiagonalFisher,),
    "magnitude": (),
    "wanda": (Power,),
    "random": (),
}
"""Score → what it reads."""


@dataclass(frozen=True)
class GradientAware:
    share: float = 0.01
    """Of the weights of a linear, those that stay in 16 bits, rounded up to a whole number of them (no unit)."""

    score: Literal["gradient", "fisher", "gain", "magnitude", "wanda", "random"] = "gradient"
    """What makes an outlier: "gradient" as the paper, "fisher" times the square of the rounding error, "gain" what
    leaving it out of its group is worth by that measure, "magnitude", "wanda" times the loudness of the input,
    "random"."""

    rounding: Literal["nearest", "gptq"] = "nearest"
    """How the others are rounded: to nearest, or with error feedback in the metric of the inputs."""

    group: int = 64
    """Neighbouring columns that share a scale; 0 for all of a row."""

    grid: Form = "asymmetric"
    """Levels of a group: "asymmetric", "symmetric" or "symmetric_full", as those of rtn."""

    width: int | None = None
    """Bits of a code, 1 to 8; None offers 2, 3, 4 and 8."""

    scale: StoredScale = "float16"
    """How scales are stored: in 16 bits, or in a byte, "log8"."""

    shrink: bool = False
    """Search for the range of each group that rounds best, instead of spanning all of it; pays at 2 and 3 bits."""

    damping: float = 0.01
    """Of the error feedback: added to the diagonal of the Gram matrix, as a fraction of the mean input power (no
    unit)."""

    act_order: bool = True
    """Of the error feedback: take the columns by falling power of their inputs."""

    seed: int = 0
    """Of the random score."""

    paper: ClassVar[str] = (
        "Shao et al., 2024, GWQ: Gradient-Aware Weight Quantization for Large Language Models (arXiv 2411.00850)"
    )
    summary: ClassVar[str] = "the weights with the largest gradients stay in 16 bits, the others are rounded"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_grid("gwq", self.group, self.grid, self.width)
        check_scale("gwq", self.scale)
        check_outliers("gwq", self.share, self.damping)
        if self.score not in SCORES:
            raise RecipeError(f"gwq: {unknown('score', str(self.score), SCORES)}")
        if self.rounding not in ("nearest", "gptq"):
            raise RecipeError(f"gwq: {unknown('rounding', str(self.rounding), ('nearest', 'gptq'))}")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (*SCORES[self.score], *((Gram,) if self.rounding == "gptq" else ()))

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        widths = WIDTHS if self.width is None else (self.width,)
        whole, *sizes = sizes_of(shape, self.group, widths, zeros=self.grid == "asymmetric", scale=self.scale)
        beside = outlier_bytes(shape, outlier_count(self.share, shape))
        return [whole, *(replace(size, nbytes=size.nbytes + beside) for size in sizes)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are those of the weight itself, ‖W - W'‖²; with error feedback tr((W - W') G (W - W')ᵀ), exact."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        dense = wide(weight).double()
        gram = metric_of(stats) if self.rounding == "gptq" else None

        def energy(off: Tensor) -> float:
            return (off * (off if gram is None else off @ gram)).sum().item()

        return [
            replace(whole, error=energy(dense)),
            *(
                replace(size, error=energy(dense - self.compress(weight, stats, size.amount).to_dense().double()))
                for size in sizes
            ),
        ]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        bits = width_of(amount, self.grid, self.width)
        values = wide(weight)
        if not torch.isfinite(values).all():
            raise NumericalError("the weight has entries that are not finite; repair the checkpoint first")
        outliers = self.outliers(weight, stats, bits)
        if self.rounding == "nearest":
            rest = values.masked_fill(outliers, 0.0)
            grid = fit_grid(rest, bits, self.group, self.grid, shrink=self.shrink, format=self.scale)
            return with_outliers(grid.nearest(rest), grid, outliers, values, weight.dtype)
        spread = spread_of("gwq", stats, self.damping, loudest_first=self.act_order)
        values = values.masked_fill(spread.dead & ~outliers, 0.0)
        grid = fit_grid(
            values.masked_fill(outliers, 0.0), bits, self.group, self.grid, shrink=self.shrink, format=self.scale
        )
        codes, values, _ = swept(values, spread, grid, outliers)
        return with_outliers(codes, grid, outliers, values, weight.dtype)

    def outliers(self, weight: Float[Tensor, "out in"], stats: Stats, bits: int) -> Bool[Tensor, "out in"]:
        """Where the weights are that stay in 16 bits; `bits` is the width of the others."""
        count = outlier_count(self.share, (weight.shape[0], weight.shape[1]))
        if self.score == "gain":
            felt = stats[DiagonalFisher].mean().view(weight.shape)
            return left_out(wide(weight), felt, count, bits, self.group, self.grid)[0]
        return largest(self._score(weight, stats, bits), count)

    def _score(self, weight: Float[Tensor, "out in"], stats: Stats, bits: int) -> Float[Tensor, "out in"]:
        weight = wide(weight).double()
        if self.score == "random":
            drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.seed), dtype=weight.dtype)
            return drawn.to(weight.device)
        if self.score == "magnitude":
            return weight.abs()
        if self.score == "wanda":
            return weight.abs() * stats[Power].mean().sqrt()
        felt = stats[DiagonalFisher].mean().view_as(weight)
        if self.score == "gradient":
            return felt
        grid = fit_grid(weight, bits, self.group, self.grid, shrink=self.shrink)
        return felt * (weight - grid.levels(grid.nearest(weight))).square()
