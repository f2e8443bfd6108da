"""Learned rounding: the codes of a quantized weight and the ends of its ranges move by gradient descent.

A code q of a group with scale s and zero point z stands for  (level(q) - z) · s  (`kinds.quantized`).  Every weight
gets a real number v in the place of its code, every group two factors α and β on the ends of its range.  With lo and hi
the lowest and highest level,

    s' = s · ((hi - z) α + (z - lo) β) / (hi - lo)      z' = lo + (z - lo) β s / s'
    t  = (v - z) · s / s' + z'                          where the weight (v - z) s lies among the levels of the new grid
    w' = (level(nearest(t)) - z') · s'

so that the range from (lo - z) s to (hi - z) s becomes the one from β (lo - z) s to α (hi - z) s.  A grid without zero
points has one factor for both ends.  Rounding passes gradients through unchanged (straight-through) as far as t lies
within half a step of the levels, and nothing beyond:

    ∂w'/∂v = s  inside, 0 outside;      ∂w'/∂s' = level - z' - (v - z) s / s'  inside, level - z'  outside;
    ∂w'/∂z' = 0  inside, -s'  outside

Scales and zero points pass through the formats that they are stored in, codes are nearest to t on what is stored, and
the forward pass computes with nothing else.  So the relaxed linear and what it hardens into agree bit for bit at any
moment; the kind, the format and the bytes are those of before.

The start is the module as it was given, exactly, whoever chose its codes: v begins inside the cell of the code that is
there, at the point of the cell nearest to the dense weight where that is known, else at the level.  Codes that error
feedback took away from the nearest level (GPTQ) thus begin at the edge of their cells, where they easily turn back.

A plain linear is rounded first, with error feedback or to nearest.  Of factorised linears and sums the quantized parts
train, each by itself; the rest stays.  With `train = ["logits"]` all codes of a model learn together from the dense
model's predictions; block by block they learn in `[step.refine]` (`tersely.refine`).

Differs from the authors' code: codes are free to move by more than one level; v starts at the codes of any method
instead of at the nearest; the ends move freely (theirs only inwards), and zero points that are no codes, tables of
levels, scales in a byte and scales of columns train alike.

Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, 2023, section 3
(arXiv 2309.05516).
Source: Esser et al., Learned Step Size Quantization, 2019, section 2 (arXiv 1902.08153), for the gradient of the scale.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tersely.errors import RecipeError
from tersely.kinds import DenseLinear, LinearKind, QuantizedLinear
from tersely.kinds.quantized import rounded
from tersely.linalg.grid import (
    SCALE_FORMATS,
    Form,
    Grid,
    Scales,
    float_zeros,
    in_groups,
    without_columns,
)
from tersely.linalg.levels import nearest_levels
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.methods.quantize.widths import check_grid
from tersely.stats import Gram, Statistic, Stats
from tersely.train.relax.adapter import learns_no_size, master
from tersely.train.relax.base import Relaxed
from tersely.train.relax.noise import pretend

INSIDE = 0.998
"""How far towards the edge of its cell, 0 to 1, a weight may begin: at the edge itself rounding could go either way."""

NEAR = 0.5
"""Share of the energy of a weight by which the quantized one may differ and still stand for it."""

NARROWEST, WIDEST = 1 / 8, 15 / 8
"""Factors on the ends of a range.  Below 2, so that the largest scale of a weight stays within float16."""


@dataclass(frozen=True)
class Rounding:
    width: int = 4
    """Bits of a code, 1 to 8, of linears that are not quantized yet; others keep theirs."""

    group: int = 64
    """Neighbouring columns that share a scale; 0 for all of a row.  Of linears that are not quantized yet."""

    grid: Form = "asymmetric"
    """Levels of a group, as of the method gptq.  Of linears that are not quantized yet."""

    start: Literal["gptq", "nearest"] = "gptq"
    """How linears that are not quantized yet are rounded before they train: with error feedback, or to nearest."""

    ranges: bool = True
    """Train the ends of ranges, and with them scales and zero points, beside the codes."""

    paper: ClassVar[str] = (
        "Cheng et al., 2023, Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs "
        "(arXiv 2309.05516)"
    )
    summary: ClassVar[str] = "codes and ranges of quantized weights learned through the rounding"

    def __post_init__(self) -> None:
        check_grid("rounding", self.group, self.grid, self.width)
        if self.start not in ("gptq", "nearest"):
            raise RecipeError(f"rounding: start = {self.start!r}; wanted gptq or nearest")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,) if self.start == "gptq" else ()

    @property
    def leaves(self) -> tuple[str, ...] | None:
        return ()

    def check(
        self, shapes: Sequence[tuple[int, int]], kinds: Sequence[tuple[int, int]], packed: int, bits: float | None
    ) -> None:
        learns_no_size("rounding", bits)

    def relax(self, linear: nn.Module, stats: Stats, generator: torch.Generator) -> Relaxed:
        match linear:
            case QuantizedLinear():
                return RoundedLinear(linear, ranges=self.ranges)
            case nn.Linear() | Conv1D() | DenseLinear(dense=nn.Linear()):
                plain = linear.dense if isinstance(linear, DenseLinear) else linear
                weight = weight_of(plain)
                assert weight is not None
                method = GPTQ if self.start == "gptq" else RoundToNearest
                made = method(group=self.group, grid=self.grid).compress(weight, stats, self.width)
                if plain.bias is not None:
                    made.set_bias(plain.bias)
                return RoundedLinear(made, weight, ranges=self.ranges)
            case LinearKind() if any(isinstance(part, QuantizedLinear) for part in linear.modules()):
                return RoundedParts(linear, ranges=self.ranges)
        raise RecipeError(
            f"rounding: a {type(linear).__name__} holds no codes on a grid that could be learned; name plain or "
            "quantized linears"
        )

    def budget(self, modules: Sequence[Relaxed], bits: float | None) -> Tensor:
        return modules[0].bits().new_zeros(())


class RoundedLinear(Relaxed):
    """A quantized linear whose codes, ranges and bias train."""

    def __init__(
        self, linear: QuantizedLinear, weight: Float[Tensor, "out in"] | None = None, *, ranges: bool = True
    ) -> None:
        """weight: the dense one that `linear` stands for, None where it is not known."""
        super().__init__()
        self.linear = linear
        self._ranges = ranges
        self._grid = grid = linear.grid()
        self._cells = _Cells.of(grid, linear.codes.device)
        self._scale = grid.scales.values()[..., None]
        self._zero = grid.zeros(torch.float32)[..., None]
        self.place = nn.Parameter(grid.placed(linear.unpacked(), torch.float32))
        if weight is not None:
            self.towards(weight)
        ends = torch.ones(*self._scale.shape[:2], 1 if grid.zero is None else 2, device=self.place.device)
        self.ends = nn.Parameter(ends) if ranges else None
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(master(linear), copy=True))

    @torch.no_grad()
    def towards(self, weight: Float[Tensor, "out in"]) -> None:
        """Begin at the dense weight, as far as the cells of the codes reach.  Ignored if that is no near relative, as
        after a rewrite or where channels were cut."""
        weight, stands = weight.detach().float(), self.linear.to_dense()
        if weight.shape != stands.shape:
            return
        off = weight - stands
        if not off.double().square().sum() < NEAR * weight.double().square().sum():
            return
        grid = self._grid
        wanted = in_groups(without_columns(weight, grid.columns), grid.group) / self._scale + self._zero
        levels = in_groups(grid.placed(self.linear.unpacked(), torch.float32), grid.group)
        start = self._cells.nearest_inside(levels, wanted)
        self.place.copy_(start.flatten(1)[:, : self.place.shape[1]])

    def weight(self) -> Float[Tensor, "out in"]:
        """What would be stored, with the gradients of what it stands for."""
        grid, scale, zero = self._trained_grid()
        place = self._among_levels(scale, zero)
        codes = self._nearest(place.detach())
        level = pretend(grid.placed(codes, torch.float32), place.clamp(self._cells.lowest, self._cells.highest))
        columns = self.place.shape[1]
        real = ((level - zero) * scale).flatten(1)[:, :columns]
        if grid.columns is not None:
            real = real * grid.columns.values()
        return pretend(grid.levels(codes.flatten(1)[:, :columns]), real)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        linear, bias = self.linear, None
        if linear.input_bits is not None and linear.bound is not None:
            x = rounded(x, linear.input_bits, linear.bound.view(torch.float32))
        if self.bias is not None:
            bias = pretend(self.bias.detach().to(linear.weight.dtype).to(x.dtype), self.bias.to(x.dtype))
        return functional.linear(x, self.weight().to(x.dtype), bias)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        learned = [self.place] if self.ends is None else [self.place, self.ends]
        return {"quantizers": learned, "weights": [] if self.bias is None else [self.bias]}

    @torch.no_grad()
    def harden(self) -> QuantizedLinear:
        grid, scale, zero = self._trained_grid()
        codes = self._nearest(self._among_levels(scale, zero)).flatten(1)[:, : self.place.shape[1]]
        made = QuantizedLinear.from_codes(codes.contiguous(), grid, self.linear.weight.dtype)
        if self.bias is not None:
            made.set_bias(self.bias)
        if self.linear.input_bits is not None and self.linear.bound is not None:
            made.round_input(self.linear.input_bits, self.linear.bound.view(torch.float32).item())
        return made

    def bits(self) -> Tensor:
        stored = (t.nbytes for name, t in self.linear.state_dict().items() if not name.endswith("bias"))
        return torch.tensor(8.0 * sum(stored), device=self.place.device)

    def _among_levels(self, scale: Tensor, zero: Tensor) -> Float[Tensor, "out groups size"]:
        """t: where the weights lie, in the units of the levels."""
        bare = in_groups(self.place, self._grid.group) - self._zero
        return bare * (self._scale / scale) + zero

    def _nearest(self, places: Tensor) -> UInt8[Tensor, "out groups size"]:
        if self._grid.table is None:
            return places.round().clamp_(0, self._grid.top).to(torch.uint8)
        return nearest_levels(places, self._grid.table)

    def _trained_grid(self) -> tuple[Grid, Tensor, Tensor]:
        """The grid as it will be stored, and its scales and zero points with gradients, ``[out, groups, 1]``."""
        old, lowest, highest = self._grid, self._cells.first, self._cells.last
        if self.ends is None:
            return old, self._scale, self._zero
        ends = self.ends.clamp(NARROWEST, WIDEST)
        if old.zero is None:
            share = ends[..., :1]
        else:
            share = (highest - self._zero) * ends[..., :1] + (self._zero - lowest) * ends[..., 1:]
            share = (share / (highest - lowest)).clamp(NARROWEST, WIDEST)
        wanted = self._scale * share
        scales = _nearest_stored(wanted.detach()[..., 0], old.scales)
        scale = pretend(scales.values()[..., None], wanted)
        if old.zero is None:
            return replace(old, scales=scales), scale, self._zero
        real = lowest + (self._zero - lowest) * ends[..., 1:] / share
        if old.zero.dtype == torch.uint8:
            zeros = real.detach()[..., 0].round().clamp(0, old.top).to(torch.uint8)
        else:
            zeros = float_zeros(real.detach()[..., 0])
        grid = replace(old, scales=scales, zero=zeros)
        return grid, scale, pretend(grid.zeros(torch.float32)[..., None], real)


class RoundedParts(Relaxed):
    """A factorised linear, or a sum, the quantized parts of which train."""

    def __init__(self, base: LinearKind, *, ranges: bool) -> None:
        super().__init__()
        parts = {name: part for name, part in base.named_modules() if isinstance(part, QuantizedLinear)}
        stands = {id(part): RoundedLinear(part, ranges=ranges) for part in parts.values()}
        self.base = deepcopy(base, dict(stands))  # a copy with the relaxed parts in the places of the quantized ones
        self._names = tuple(parts)
        self._bytes = sum(t.nbytes for name, t in base.state_dict().items() if not name.endswith("bias"))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out

    def groups(self) -> dict[str, list[nn.Parameter]]:
        found = [part.groups() for part in self._parts()]
        return {group: [p for of_part in found for p in of_part[group]] for group in ("quantizers", "weights")}

    def harden(self) -> nn.Module:
        return deepcopy(self.base, {id(part): part.harden() for part in self._parts()})

    def bits(self) -> Tensor:
        return torch.tensor(8.0 * self._bytes, device=next(self.parameters()).device)

    def _parts(self) -> list[RoundedLinear]:
        parts = [self.base.get_submodule(name) for name in self._names]
        return [part for part in parts if isinstance(part, RoundedLinear)]


def weight_of(linear: nn.Module | None) -> Float[Tensor, "out in"] | None:
    """The weight of a plain linear; None for anything else."""
    match linear:
        case nn.Linear():
            return linear.weight.detach()
        case Conv1D():
            return linear.weight.detach().T.contiguous()
    return None


@dataclass(frozen=True)
class _Cells:
    """The levels of a grid, rising, and the points between them; zero points and scales left out."""

    levels: Float[Tensor, " levels"]
    edges: Float[Tensor, " edges"]
    """Midpoints between neighbours, and beyond the first and the last level the like on the other side."""

    @classmethod
    def of(cls, grid: Grid, device: torch.device) -> "_Cells":
        codes = torch.arange(grid.top + 1, dtype=torch.uint8, device=device)
        levels = grid.placed(codes, torch.float32).unique()
        middle = (levels[1:] + levels[:-1]) / 2
        return cls(levels, torch.cat([2 * levels[:1] - middle[:1], middle, 2 * levels[-1:] - middle[-1:]]))

    @property
    def first(self) -> float:
        return float(self.levels[0])

    @property
    def last(self) -> float:
        return float(self.levels[-1])

    @property
    def lowest(self) -> float:
        return float(self.edges[0])

    @property
    def highest(self) -> float:
        return float(self.edges[-1])

    def nearest_inside(self, levels: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"]) -> Tensor:
        """The points nearest to those wanted in the cells of some levels."""
        cell = torch.searchsorted(self.levels, levels.contiguous())
        low, high = self.edges[cell], self.edges[cell + 1]
        return wanted.clamp(levels + INSIDE * (low - levels), levels + INSIDE * (high - levels))


def _nearest_stored(wanted: Float[Tensor, "out groups"], like: Scales) -> Scales:
    """Positive scales in a format, each as near as the format has one; those of a format in bytes by their ratio."""
    read, kept = SCALE_FORMATS[like.format]
    if kept == torch.uint8:
        rungs = replace(like, raw=torch.arange(256, dtype=torch.uint8, device=wanted.device)).values()
        codes = ((rungs > 0) & rungs.isfinite()).nonzero()[:, 0]
        heights = rungs[codes].double().log2()
        place = torch.bucketize(wanted.double().log2(), (heights[1:] + heights[:-1]) / 2)
        return replace(like, raw=codes[place].to(torch.uint8))
    largest = torch.tensor(torch.finfo(read).max, dtype=read, device=wanted.device).view(kept)
    raw = (wanted * 2.0**-like.exponent).to(read).view(kept)
    return replace(like, raw=raw.clamp(min=1).minimum(largest))
