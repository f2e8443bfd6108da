"""HQQ: zero points that make the small errors smaller and leave the large ones alone.

Rounding has a few large errors, those of outlying weights, and a square norm moves the whole grid for their sake.  With
the scales s of a group fixed, the zero point is chosen for  Σ |w - w'|^p,  p < 1, which nearly counts how many weights
are off.  Half-quadratic splitting, with a copy e of the error:

    q = clamp(round(w / s + z), 0, 2^b - 1)        w' = (q - z) s
    e = shrink(w - w')                             shrink(x) = sign(x) · relu(|x| - |x|^(p-1) / β)
    z = mean over the group of  q - (w - e) / s    β ← κ β

The method needs no data and takes little longer than rounding to nearest.  The zero point is no code any more: it is
stored as a float16, 16 bits of a group where a code takes b.

Differences from the authors' code: of all zero points of a group that were passed through, as they are stored, the one
with the least Σ|w - w'|^p is kept (their older solver keeps the first that fails, their newer one the best of the
whole weight), so no group is worse than at the start; all rounds are run.  β is in units of the weight's deviation:
their β is absolute, and 10 for weights with a deviation σ is 10 σ^(2-p) here, 0.06 to 0.2 of common weights.  There
every error is shrunk to zero, and z is the mean residual; `beta` decides.  The range of a group holds zero.  κ is 1 in
their older solver and 1.01 in the newer one.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023
(mobiusml.github.io/hqq_blog).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import Grid, fit_grid, float_zeros, in_groups, nearest_codes, wide, without_columns
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

    beta: float = 0.1
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
    beta: float = 0.1,
    growth: float = 1.0,
    rounds: int = 20,
) -> Grid:
    """A grid of integers with its zero points chosen anew, as floats; scales and columns stay.  Σ|w - w'|^norm of no
    group is larger than with the zero points that it had."""
    bare = without_columns(wide(weight), grid.columns)
    groups = in_groups(bare, grid.group)
    inside = in_groups(torch.ones_like(bare[:1]), grid.group)
    scale = grid.scales.values().to(bare.dtype)[..., None]
    unit = bare.double().square().mean().sqrt().to(bare.dtype)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))

    zero = float_zeros(grid.zeros(bare.dtype))
    best, least = zero, torch.full(zero.shape, math.inf, dtype=bare.dtype, device=bare.device)
    for _ in range(rounds + 1):
        z = zero.view(torch.float16).to(bare.dtype)[..., None]
        codes = nearest_codes(groups, scale, z, grid.top, free=True)
        off = (groups - (codes - z) * scale) / unit
        size = off.abs()
        lost = (size**norm * inside).sum(-1)
        better = lost < least
        best, least = torch.where(better, zero, best), torch.where(better, lost, least)
        kept = off.sign() * (size - size.clamp(min=SMALLEST) ** (norm - 1) / beta).clamp(min=0)
        mean = ((codes - (groups - kept * unit) / scale) * inside).sum(-1) / inside.sum(-1)
        zero, beta = float_zeros(mean), beta * growth
    return replace(grid, zero=best)
