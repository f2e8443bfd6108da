"""HQQ: zero points that make the small errors smaller and leave the large ones alone.

Rounding has a few large errors, those of outlying weights, and a square norm moves the whole grid for their sake.  With
the scales s of a group fixed, the zero point is chosen for  Σ |w - w'|^p,  p < 1, which nearly counts how many weights
are off.  Half-quadratic splitting, with a copy e of the error:

    q = clamp(round(w / s + z), 0, 2^b - 1)        w' = (q - z) s
    e = shrink(w - w')                             shrink(x) = sign(x) · relu(|x| - |x|^(p-1) / β)
    z = mean over the group of  q - (w - e) / s    β ← κ β

The first z is that at which the range of the group ends on levels, -min / s, and no code: where it is rounded as zero
points that are codes, a model of 2 bits is worse by a sixth, whatever comes after.  The method needs no data and takes
little longer than rounding to nearest.  Zero points are stored as float16, 16 bits of a group where a code takes b.

Differences from the authors' code: of all zero points that a row passed through, as they are stored, those with the
least Σ|w - w'|^p are kept (their older solver keeps the first that fails, their newer one the best of the whole
weight), the rounded ones among them, so no row is worse than with those; all rounds are run.  β is in units of the
weight's deviation: their β is absolute, and 10 for weights with a deviation σ is 10 σ^(2-p) here, 0.06 to 0.5 of common
weights.  There every error is shrunk to zero, and z is the mean residual; from 2 on the largest errors survive, as is
meant, and a 2-bit model is better for it (docs/lab.md).  The range of a group holds zero.  κ is 1 in their older solver
and 1.01 in the newer one.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023
(mobiusml.github.io/hqq_blog).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kernels import nearest_codes
from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import AT_ONCE, Grid, fit_grid, float_zeros, in_groups, wide, without_columns
from tersely.methods.quantize.widths import WIDTHS, StoredScale, check_grid, check_scale, sizes_of, width_of
from tersely.option import Option
from tersely.stats import Statistic, Stats

SMALLEST = 1e-5
"""Errors below count as this under a negative power; in units of the weight's deviation."""


@dataclass(frozen=True)
class HalfQuadratic:
    group: int = 64
    """Neighbouring columns that share a scale and a zero point; 0 for all of a row."""

    width: int | None = None
    """Bits of a code, 1 to 8; None offers 2, 3, 4 and 8."""

    norm: float = 0.7
    """p, above 0 and at most 1: the smaller, the less outlying weights count.  The authors' is 0.7."""

    beta: float = 3.0
    """β of the first round, in units of the weight's deviation; small ones shrink every error to nothing."""

    growth: float = 1.0
    """κ: what β is multiplied by after every round."""

    rounds: int = 20
    """Zero points that are tried after the first."""

    scale: StoredScale = "float16"
    """How scales are stored: "float16", or "log8" in a byte."""

    paper: ClassVar[str] = (
        "Badri and Shaji, 2023, Half-Quadratic Quantization of Large Machine Learning Models (mobiusml.github.io)"
    )
    summary: ClassVar[str] = "zero points for an error norm that outlying weights do not rule, data-free"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_grid("hqq", self.group, "asymmetric", self.width)
        check_scale("hqq", self.scale)
        if not 0 < self.norm <= 1:
            raise RecipeError(f"hqq: norm {self.norm}; wanted more than 0 and at most 1")
        for name, value in (("beta", self.beta), ("growth", self.growth)):
            if not 0 < value < math.inf:
                raise RecipeError(f"hqq: {name} {value}; wanted a positive number")
        if self.rounds < 0:
            raise RecipeError(f"hqq: rounds {self.rounds}; wanted 0 (rounding to nearest) or more")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        widths = WIDTHS if self.width is None else (self.width,)
        return sizes_of(shape, self.group, widths, zeros="float16", scale=self.scale)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are those of the weight itself, ‖W - W'‖², as if inputs were white."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        dense = wide(weight)
        grids = [self._grid(dense, width_of(size.amount, "asymmetric", self.width)) for size in sizes]
        lost = [(dense - grid.levels(grid.nearest(dense))).double().square().sum().item() for grid in grids]
        energy = dense.double().square().sum().item()
        return [replace(whole, error=energy), *(replace(size, error=e) for size, e in zip(sizes, lost, strict=True))]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> QuantizedLinear:
        grid = self._grid(wide(weight), width_of(amount, "asymmetric", self.width))
        return QuantizedLinear.from_codes(grid.nearest(weight), grid, weight.dtype)

    def _grid(self, weight: Float[Tensor, "out in"], bits: int) -> Grid:
        grid = fit_grid(weight, bits, self.group, format=self.scale)
        return robust_zeros(weight, grid, self.norm, self.beta, self.growth, self.rounds)


def robust_zeros(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    norm: float = 0.7,
    beta: float = 3.0,
    growth: float = 1.0,
    rounds: int = 20,
) -> Grid:
    """A grid of integers with its zero points chosen anew, as floats; scales and columns stay.  Σ|w - w'|^norm of no
    row is larger than with the zero points that it had."""
    bare = without_columns(wide(weight), grid.columns)
    unit = bare.double().square().mean().sqrt().to(bare.dtype)
    search = _Search(
        in_groups(torch.ones_like(bare[:1]), grid.group),
        grid.top,
        torch.where(unit > 0, unit, torch.ones_like(unit)),
        norm,
        beta,
        growth,
        rounds,
    )
    rows = max(1, AT_ONCE // max(1, bare.shape[1]))
    parts = zip(
        in_groups(bare, grid.group).split(rows),
        grid.scales.values().to(bare.dtype)[..., None].split(rows),
        grid.zeros(bare.dtype).split(rows),
        strict=True,
    )
    return replace(grid, zero=torch.cat([search.best(*part) for part in parts]))


@dataclass(frozen=True)
class _Search:
    """For zero points of some rows, which do not know of other rows."""

    inside: Float[Tensor, "1 groups size"]
    """1 for a weight, 0 where the last group is filled up."""
    top: int
    unit: Float[Tensor, ""]
    norm: float
    beta: float
    growth: float
    rounds: int

    def best(
        self,
        weights: Float[Tensor, "rows groups size"],
        scale: Float[Tensor, "rows groups 1"],
        given: Float[Tensor, "rows groups"],
    ) -> Int16[Tensor, "rows groups"]:
        """As they are stored."""
        zero, beta = float_zeros(-weights.amin(-1).clamp(max=0) / scale[..., 0]), self.beta
        best = float_zeros(given)
        least, _ = self._round(weights, scale, best, beta)
        for _ in range(self.rounds):
            lost, after = self._round(weights, scale, zero, beta)
            better = lost < least
            best, least = torch.where(better[:, None], zero, best), torch.where(better, lost, least)
            zero, beta = after, beta * self.growth
        return best

    def _round(
        self,
        weights: Float[Tensor, "rows groups size"],
        scale: Float[Tensor, "rows groups 1"],
        stored: Int16[Tensor, "rows groups"],
        beta: float,
    ) -> tuple[Float[Tensor, " rows"], Int16[Tensor, "rows groups"]]:
        """Σ|w - w'|^p of every row with these zero points, and the next ones.

        With c = (w - w') - e, which is the error cut off at |w - w'|^(p-1) / β, the next are  z - mean c / s.
        """
        zero = stored.view(torch.float16).to(scale.dtype)
        codes = nearest_codes(weights, scale, zero[..., None], self.top, free=True)
        off = codes.sub_(zero[..., None]).mul_(scale).neg_().add_(weights).div_(self.unit).mul_(self.inside)
        size = off.abs()
        powers = size**self.norm
        bound = (powers / size).clamp_(max=SMALLEST ** (self.norm - 1)).div_(beta)  # 0 / 0 is larger than any error
        cut = torch.minimum(size, bound.nan_to_num_(math.inf)).copysign_(off)
        step = cut.sum(-1).mul_(self.unit).div_(self.inside.sum(-1)).div_(scale[..., 0])
        return powers.sum((-1, -2)), float_zeros(zero - step)
