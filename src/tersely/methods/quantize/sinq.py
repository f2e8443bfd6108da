"""SINQ: a second scale, along the columns, that makes rows and columns of a weight vary alike before it is rounded.

    W' = diag(s) (Q - z) diag(t)    group by group

A column that varies more than its neighbours sets the scale of every row's group; divided by t it does not.  In slabs
of `group` columns, t is found by a Sinkhorn-like iteration that evens out the deviations of rows and columns
(`linalg.sinkhorn`), blind to the data.  W / t is then rounded in groups as ever.  Trained columns vary most where the
inputs are quiet, so t does, without looking, what scaling by activations does by looking.  Rounding in groups has a
scale for every row anyway, so the row side of the iteration changes no code; it is not stored and only guides t.

Levels are integers with a zero point (`shift`), without one, or tables: NF4 and NF3 with the mean of a group at zero.

Calibrated (A-SINQ), t is divided by one of 20 scales of the inputs on top of that,

    a_j = mean|x_j|^α / (mean_i|W_ij|^(1-α) + 1e-4),    α = 0, 0.05, ..., 0.95,

whichever has the least mean |error| of an output.  No inputs are kept for that.  The error of output i is δ_iᵀ x, a sum
over all inputs and hence nearly normal, of variance δ_i G δ_iᵀ with G = E[x xᵀ]: its mean magnitude is √(2/π) times the
root of that, so the norm that is compared is  Σ_i √(δ_i G δ_iᵀ),  of the Gram matrix that every other method reads.

With `feedback` the codes on this grid are chosen column by column with the error feedback of GPTQ: scales of columns
commute with it.  With `robust` the zero points are those of HQQ.

Differences from the authors' code: W is divided by its deviation before the iteration; the range of a group holds zero,
so that its zero point is a code; t is stored first, scales next, and codes chosen on what was stored; a slab at the end
may be narrower (they narrow all of them).  Means of inputs and weights are taken relative to their own mean, so that
1e-4 means the same in any unit, and no a at all is a candidate too: the calibrated loss is never above the blind one.
Scales in a byte are steps of one ratio ("log8") in place of 32 even steps.  No kurtosis decides that a weight is
rounded without all this.

Source: Müller et al., SINQ: Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights, 2025,
sections 2 and 3 (arXiv 2509.22944).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersely.errors import NumericalError, RecipeError, unknown
from tersely.kinds.quantized import QuantizedLinear, Zeros
from tersely.linalg.grid import Form, Grid, Scales, fit_grid, fit_table, wide
from tersely.linalg.levels import bits_of
from tersely.linalg.sinkhorn import column_balance
from tersely.methods.quantize.gptq import rounded_with_feedback
from tersely.methods.quantize.hqq import robust_zeros
from tersely.methods.quantize.outliers import metric_of, spread_of
from tersely.methods.quantize.widths import (
    WIDTHS,
    StoredScale,
    check_grid,
    check_scale,
    check_width,
    sizes_of,
    width_of,
)
from tersely.option import Amount, Option
from tersely.stats import AbsMean, Gram, Statistic, Stats

Levels = Literal["integers", "nf4", "nf3"]

ALPHAS = tuple(step / 20 for step in range(20))
SMALLEST = 1e-4
"""Bound of the scales of inputs from below, relative to their mean."""


@dataclass(frozen=True)
class SinkhornNormalized:
    group: int = 64
    """Neighbouring columns that share a scale, and that are balanced together; 0 for all of a row."""

    width: int | None = None
    """Bits of a code, 1 to 8; None offers 2, 3, 4 and 8.  Tables have one width."""

    levels: Levels = "integers"
    """What is rounded to: "integers", or the tables "nf4" and "nf3"."""

    shift: bool = True
    """With a zero point for every group; of tables it is the mean of the group, in 16 bits."""

    scale: StoredScale = "float16"
    """How scales are stored: "float16", or "log8" in a byte."""

    rounds: int = 16
    """Iterates that are looked at; 1 leaves the weight as it is."""

    calibrated: bool = False
    """Scale by the inputs as well, with a searched exponent (A-SINQ)."""

    feedback: bool = False
    """Choose the codes with error feedback, as GPTQ does."""

    robust: bool = False
    """Zero points by half-quadratic splitting, in 16 bits (HQQ); of integers with a shift."""

    damping: float = 0.01
    """With `feedback`: λ, as a fraction of the mean input power (no unit)."""

    act_order: bool = True
    """With `feedback`: take the columns by falling power of their inputs, rather than from left to right."""

    paper: ClassVar[str] = (
        "Müller et al., 2025, SINQ: Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights "
        "(arXiv 2509.22944)"
    )
    summary: ClassVar[str] = "rounding under a second scale, which evens out rows and columns; data-free unless asked"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.levels not in get_args(Levels):
            raise RecipeError(f"sinq: {unknown('levels', str(self.levels), get_args(Levels))}")
        check_grid("sinq", self.group, self._form, self.width)
        check_scale("sinq", self.scale)
        if self.levels != "integers" and self.width not in (None, bits_of(self.levels)):
            raise RecipeError(f"sinq: width {self.width} of {self.levels}; wanted none, or {bits_of(self.levels)}")
        if self.rounds < 1:
            raise RecipeError(f"sinq: rounds {self.rounds}; wanted 1 (no scaling) or more, 16 is usual")
        if self.robust and (self.levels != "integers" or not self.shift):
            raise RecipeError("sinq: robust chooses zero points of integers; wanted levels = integers and shift = true")
        if not 0 <= self.damping < math.inf:
            raise RecipeError(f"sinq: damping {self.damping}; wanted 0 or more, a fraction of the mean input power")

    @property
    def _form(self) -> Form:
        return "asymmetric" if self.shift or self.levels != "integers" else "symmetric"

    @property
    def _widths(self) -> tuple[int, ...]:
        if self.levels != "integers":
            return (bits_of(self.levels),)
        return WIDTHS if self.width is None else (self.width,)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (AbsMean, Gram) if self.calibrated else (Gram,) if self.feedback else ()

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        floats = self.robust or self.levels != "integers"
        zeros: Zeros = self.shift and ("float16" if floats else True)
        return sizes_of(shape, self.group, self._widths, zeros=zeros, scale=self.scale, columns=True)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact: tr((W - W') G (W - W')ᵀ) of the W' that `compress` will make where inputs are read, and
        those of the weight itself, ‖W - W'‖², where they are not."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        dense = wide(weight)
        metric = _metric(stats) if self.needs else None
        balanced = column_balance(dense, self.group, self.rounds)
        made = (self._rounded(dense, balanced, stats, size.amount) for size in sizes)
        lost = [_error(dense - grid.levels(codes), metric) for codes, grid in made]
        energy = _error(dense, metric)
        return [replace(whole, error=energy), *(replace(size, error=e) for size, e in zip(sizes, lost, strict=True))]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> QuantizedLinear:
        if self.levels == "integers":
            width_of(amount, self._form, self.width)
        else:
            check_width(amount, bits_of(self.levels), self.levels)
        dense = wide(weight)
        codes, grid = self._rounded(dense, column_balance(dense, self.group, self.rounds), stats, amount)
        return QuantizedLinear.from_codes(codes, grid, weight.dtype)

    def _rounded(
        self, weight: Float[Tensor, "out in"], balanced: Float[Tensor, " in"], stats: Stats, bits: int
    ) -> tuple[UInt8[Tensor, "out in"], Grid]:
        """Codes and their grid; `balanced`: t of the iteration."""
        if self.calibrated:
            grid = self._calibrated(weight, balanced, stats, bits)
        else:
            grid = self._fitted(weight, Scales.of(balanced), bits)
        if not self.feedback:
            return grid.nearest(weight), grid
        spread = spread_of("sinq", stats, self.damping, loudest_first=self.act_order)
        return rounded_with_feedback(weight.masked_fill(spread.dead, 0.0), grid, spread)[0], grid

    def _fitted(self, weight: Float[Tensor, "out in"], columns: Scales, bits: int) -> Grid:
        if self.levels != "integers":
            return fit_table(weight, self.levels, self.group, shift=self.shift, format=self.scale, columns=columns)
        grid = fit_grid(weight, bits, self.group, self._form, format=self.scale, columns=columns)
        return robust_zeros(weight, grid) if self.robust else grid

    def _calibrated(
        self, weight: Float[Tensor, "out in"], balanced: Float[Tensor, " in"], stats: Stats, bits: int
    ) -> Grid:
        """The grid whose columns are scaled by the inputs as suits these outputs best."""
        metric = _metric(stats).to(weight.dtype)
        loudness, size = stats[AbsMean].mean(), weight.abs().mean(0, dtype=torch.float64)
        if not torch.isfinite(loudness).all():
            raise NumericalError(
                "the input statistic has entries that are not finite; calibrate in float32 or bfloat16"
            )
        candidates = [balanced, *(balanced / _of_inputs(_relative(loudness), _relative(size), a) for a in ALPHAS)]
        grids = [self._fitted(weight, Scales.of(columns), bits) for columns in candidates]
        return min(grids, key=lambda grid: magnitude(weight - grid.levels(grid.nearest(weight)), metric))


def magnitude(off: Float[Tensor, "out in"], metric: Float[Tensor, "in in"]) -> float:
    """Σ_i √(δ_i G δ_iᵀ): √(π/2) times the summed mean |error| of the outputs, where errors are normal."""
    return ((off @ metric) * off).sum(1).clamp(min=0).sqrt().sum(dtype=torch.float64).item()


def _of_inputs(loudness: Float[Tensor, " in"], size: Float[Tensor, " in"], alpha: float) -> Float[Tensor, " in"]:
    """a, from mean|x_j| and mean_i|W_ij|, each relative to its own mean."""
    scale = (loudness**alpha).clamp(min=SMALLEST) / (size ** (1 - alpha) + SMALLEST)
    scale = scale.clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def _relative(values: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
    mean = values.mean()
    return values / torch.where(mean > 0, mean, torch.ones_like(mean))


def _metric(stats: Stats) -> Float[Tensor, "in in"]:
    metric = metric_of(stats)
    if not torch.isfinite(metric).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    return metric


def _error(off: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | None) -> float:
    off = off.double()
    return (off.square() if metric is None else (off @ metric) * off).sum().clamp(min=0).item()
