"""AWQ: scale the columns that meet loud inputs up before rounding, and down again afterwards.

Rounding errors of a column count as much as its input is loud, but its range is shared with the quiet columns of its
group.  With a factor t_j < 1 for a loud column j,

    W' = Q(W diag(1/t)) diag(t),        t_j = 1 / s_j,    s_j = p_j^(α/2),    p_j = E[x_j²],

the column takes a larger part of the levels and its error shrinks by about t_j, while the steps of the group grow only
as far as the column sets its range.  The exponent α is searched on 0, 1/n, ..., 1; what is minimised is the error of
the output,

    tr((W - W') G (W - W')ᵀ) = E‖W x - W' x‖²,        G = E[x xᵀ],

the expectation itself over all calibration tokens, not over a sample of them.  α = 0 is rounding to nearest, number for
number, so the result is never worse than that in this metric.

The factors are stored, 16 bits for a column (`kinds.quantized`), and multiply the weight.  So every linear has its own,
o and down included, which no norm stands in front of; on a matrix of 4096 rows they are 0.004 bits per weight, on one
of 128 rows 0.125.  Codes are chosen on the factors as they are stored.

`clip` then searches, for each row and group, for a part c of the range, 1, 0.95, ..., 0.5, that rounds best in the
metric of the group's own inputs, (w - w')_g G_gg (w - w')_gᵀ; a row in which the groups together lose by it keeps its
whole ranges.  With `rounding = "gptq"` codes are chosen with error feedback (`methods.quantize.gptq`) on the same
levels, with the α found, or with 0 where that is better.

Departures from the authors' code: theirs folds the factors into the norm, or the linear, before, for all linears that
read the same input together, and inspects the output of the attention or MLP around them; takes E|x_j| for √p_j; leaves
out α = 1, and the clipping of q and k; and clips on 512 tokens.  Inputs that were silent get the factor of the most
silent of the others, as nothing is known of their size.

Source: Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023, section 3
(arXiv 2306.00978).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import Form, Grid, Scales, fit_grid, group_size, in_groups, wide, without_columns
from tersely.linalg.hessian import feedback
from tersely.methods.quantize.gptq import rounded_with_feedback
from tersely.methods.quantize.widths import check_grid, width_of, width_sizes
from tersely.option import Option
from tersely.stats import Gram, Statistic, Stats

Choice = Literal["nearest", "gptq"]

PARTS = tuple(1 - percent / 100 for percent in range(0, 51, 5))
"""Parts of a range that clipping tries."""

QUIETEST = 1e-8
"""Powers below this, relative to the loudest input, count as this."""

DAMPING = 0.01
"""Of error feedback, as a fraction of the mean input power; the default of the method gptq."""


@dataclass(frozen=True)
class ActivationAware:
    group: int = 64
    """Neighbouring columns that share a scale; 0 for all of a row.  A smaller one is better and takes more bytes."""

    grid: Form = "asymmetric"
    """Levels of a group: "asymmetric" from its least to its largest weight, with a zero point; "symmetric" around zero;
    "symmetric_full" likewise, using the lowest level and clipping the largest weight by half a step."""

    width: int | None = None
    """Bits of a code, 1 to 8; None offers 2, 3, 4 and 8."""

    points: int = 20
    """n: exponents that are tried beside 0."""

    clip: bool = True
    """Search for the part of each range that rounds best, instead of spanning all of it."""

    rounding: Choice = "nearest"
    """How codes are chosen: "nearest", or "gptq" with error feedback."""

    paper: ClassVar[str] = (
        "Lin et al., 2023, AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration "
        "(arXiv 2306.00978)"
    )
    summary: ClassVar[str] = "columns of loud inputs scaled up before rounding, by a searched exponent"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_grid("awq", self.group, self.grid, self.width)
        if self.points < 0:
            raise RecipeError(f"awq: points = {self.points}; wanted 0 (no scaling) or more, 20 is usual")
        if self.rounding not in get_args(Choice):
            raise RecipeError(f"awq: rounding = {self.rounding!r}; wanted one of {get_args(Choice)}")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        nothing, *widths = width_sizes(shape, self.group, self.grid, self.width)
        return [nothing, *(replace(width, nbytes=width.nbytes + 2 * shape[1]) for width in widths)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact, tr((W - W') G (W - W')ᵀ) of the W' that `compress` will make."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        gram = _gram(stats)
        dense = wide(weight)
        energy = _lost(dense.double(), gram).sum().item()
        made = (self._rounded(dense, gram, width_of(size.amount, self.grid, self.width)) for size in sizes)
        lost = (_lost((dense - grid.levels(codes)).double(), gram).sum().item() for codes, grid in made)
        return [replace(whole, error=energy), *(replace(size, error=e) for size, e in zip(sizes, lost, strict=True))]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> QuantizedLinear:
        bits = width_of(amount, self.grid, self.width)
        codes, grid = self._rounded(wide(weight), _gram(stats), bits)
        return QuantizedLinear.from_codes(codes, grid, weight.dtype)

    def _rounded(
        self, weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], bits: int
    ) -> tuple[UInt8[Tensor, "out in"], Grid]:
        plain = self._fitted(weight, bits, _factors(gram, 0.0))
        metric = _Metric.of(weight, gram)
        fitted = plain
        least = metric.lost(weight - plain.levels(plain.nearest(weight))).sum()
        for point in range(1, self.points + 1):
            grid = self._fitted(weight, bits, _factors(gram, point / self.points))
            lost = metric.lost(weight - grid.levels(grid.nearest(weight))).sum()
            if lost < least:
                fitted, least = grid, lost
        grids = [fitted]
        if self.clip:
            grids.append(self._clipped(weight, fitted, metric, bits))
        if self.rounding == "gptq":
            spread = feedback(gram, damping=DAMPING, loudest_first=True)
            grids.append(plain)
            tried = [(rounded_with_feedback(weight, grid, spread)[0], grid) for grid in grids]
        else:
            tried = [(grid.nearest(weight), grid) for grid in grids]
        return min(tried, key=lambda made: float(metric.lost(weight - made[1].levels(made[0])).sum()))

    def _fitted(self, weight: Float[Tensor, "out in"], bits: int, columns: Scales) -> Grid:
        return fit_grid(weight, bits, self.group, self.grid, columns=columns)

    def _clipped(self, weight: Float[Tensor, "out in"], whole: Grid, metric: "_Metric", bits: int) -> Grid:
        """The grid of a weight the groups of which are clipped to the best of PARTS."""
        assert whole.columns is not None
        columns, width = whole.columns, weight.shape[1]
        bare = in_groups(without_columns(weight, columns), self.group)
        low, high = bare.amin(-1, keepdim=True).clamp(max=0), bare.amax(-1, keepdim=True).clamp(min=0)
        if self.grid != "asymmetric":
            high = torch.maximum(-low, high)
            low = -high

        def of_part(part: Tensor | float) -> Grid:
            clipped = bare.clamp(low * part, high * part).flatten(1)[:, :width]
            return self._fitted(clipped * columns.values().to(clipped.dtype), bits, columns)

        least = torch.full_like(high, torch.inf)
        best = torch.ones_like(high)
        for part in PARTS:
            grid = of_part(part)
            lost = metric.lost_in_groups(weight - grid.levels(grid.nearest(weight)), self.group)
            best = torch.where(lost < least, part, best)
            least = torch.minimum(lost, least)
        grid = of_part(best)
        lost, before = (metric.lost(weight - g.levels(g.nearest(weight))) for g in (grid, whole))
        return of_part(torch.where((lost < before)[:, None, None], best, 1.0))


@dataclass(frozen=True)
class _Metric:
    """tr(E G Eᵀ) row by row, in units in which both factors are of ordinary size: those of float32 suffice."""

    gram: Float[Tensor, "in in"]
    """Over the mean power, in the dtype of the weight."""
    unit: Tensor
    """The largest weight."""

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> "_Metric":
        largest = weight.abs().max()
        power = gram.diagonal().mean()
        gram = gram / torch.where(power > 0, power, torch.ones_like(power))
        return cls(gram.to(weight.dtype), torch.where(largest > 0, largest, torch.ones_like(largest)))

    def lost(self, off: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        return _lost(off / self.unit, self.gram)

    def lost_in_groups(self, off: Float[Tensor, "out in"], group: int) -> Float[Tensor, "out groups 1"]:
        """As if the inputs of different groups were uncorrelated."""
        width, size = off.shape[1], group_size(off.shape[1], group)
        off = in_groups(off / self.unit, group)
        found = []
        for number, start in enumerate(range(0, width, size)):
            end = min(start + size, width)
            here = off[:, number, : end - start]
            found.append(((here @ self.gram[start:end, start:end]) * here).sum(1, keepdim=True))
        return torch.stack(found, dim=1)


def _lost(off: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> Float[Tensor, " out"]:
    return ((off @ gram) * off).sum(1, dtype=torch.float64)


def _gram(stats: Stats) -> Float[Tensor, "in in"]:
    """G; the identity where every input was silent, so that nothing is known."""
    gram = stats[Gram].mean().double()
    if not torch.isfinite(gram).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    return gram if gram.diagonal().any() else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _factors(gram: Float[Tensor, "in in"], exponent: float) -> Scales:
    """t, as it is stored: p^(-α/2), for powers p relative to the loudest."""
    power = gram.diagonal().clamp(min=0)
    power = power / power.max()
    quietest = power[power > 0].min()
    return Scales.of(power.clamp(min=max(float(quietest), QUIETEST)).pow(-exponent / 2).float())
