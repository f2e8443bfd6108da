"""Uniform grids: which numbers a group of weights may take, and which of them is nearest.

Each row of a weight is cut into groups of neighbouring columns, and a group has one scale s and one zero point z.  A
code q of b bits stands for  (q - z) · s.

    asymmetric       s = (max - min) / (2^b - 1),   z = round(-min / s)   zero belongs to the range: min <= 0 <= max
    symmetric        s = max|w| / (2^(b-1) - 1),    z = 2^(b-1)           the lowest level stays unused
    symmetric_full   s = 2 max|w| / (2^b - 1),      z = 2^(b-1)           the highest weight is clipped by half a step

The scales are stored in 16 bits, and the stored ones choose the codes: what is dequantized is what was chosen.  A scale
is rounded up, never down, so that the grid still covers its group and  |w - w'| <= s / 2  holds for every weight of the
group that was fitted.  One power of two for the whole weight, `exponent`, keeps float16 from running out of range: the
largest scale lies at 2^14, so multiplying a weight by a power of two changes neither codes nor stored scales.  Scales
below 2^-28 of the largest lose digits, and one of less than 2^-38 of it is stored as that; the weights of such a group
are off by at most half of it.

Scales travel as integers that hold the bits of a float: casting a model to another float type then cannot change them.
A scale of 11 binary digits times a code of 8 is exact in float32.

A group of zeros has no range; it takes the largest scale of the weight, so that error feedback can use it.
"""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import pad

from tersely.errors import NumericalError

Form = Literal["asymmetric", "symmetric", "symmetric_full"]
FORMS: tuple[Form, ...] = get_args(Form)

ScaleFormat = Literal["float16", "bfloat16", "float32"]
SCALE_FORMATS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
    "float32": (torch.float32, torch.int32),
}
"""Format of stored scales → how they are read, how they are kept."""

TOP = 15  # the largest scale, times 2^-exponent, lies in [2^14, 2^15]: rounding up never leaves float16
LOWEST_EXPONENT = -102  # the smallest float16 times this power of two is still a normal float32

SHRINKS = tuple(1 - percent / 100 for percent in range(1, 80))
SHRINK_NORM = (
    2.4  # GPTQ's exponent of the error that the search minimises: outliers count a little more than in squares
)


@dataclass(frozen=True)
class Scales:
    """Scales as they are stored, one for each row and group."""

    raw: Int[Tensor, "rows groups"]
    """The bits of floats in `format`."""
    format: ScaleFormat
    exponent: int

    @classmethod
    def of(
        cls, wanted: Float[Tensor, "rows groups"], format: ScaleFormat = "float16", exponent: int | None = None
    ) -> Self:
        """The nearest stored scales that are not smaller than those wanted.  Those of zero become the largest one.

        `exponent`: None chooses it by the largest scale.
        """
        largest = wanted.max()
        if not torch.isfinite(largest):
            raise NumericalError(
                "the weight has entries that are not finite; repair the checkpoint before compressing it"
            )
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        wanted = torch.where(wanted > 0, wanted, largest)
        if exponent is None:
            exponent = max(int(torch.frexp(largest).exponent) - TOP, LOWEST_EXPONENT)
        read, kept = SCALE_FORMATS[format]
        wanted = wanted * 2.0**-exponent
        rounded = wanted.to(read)
        # one more in the last place of a positive float is one more in its bits
        return cls(rounded.view(kept) + (rounded.to(wanted.dtype) < wanted).to(kept), format, exponent)

    def values(self) -> Float[Tensor, "rows groups"]:
        return self.raw.view(SCALE_FORMATS[self.format][0]).float() * 2.0**self.exponent


@dataclass(frozen=True)
class Grid:
    """The levels of a weight."""

    bits: int
    group: int
    """Neighbouring columns that share a scale; 0 for all of a row.  The last group of a row may be smaller."""
    scales: Scales
    zero: UInt8[Tensor, "rows groups"] | None
    """The code that stands for 0; None where it is 2^(bits - 1) throughout."""

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    def zeros(self, dtype: torch.dtype) -> Float[Tensor, "rows groups"]:
        """The code that stands for 0, everywhere."""
        if self.zero is None:
            return torch.full_like(self.scales.raw, 2 ** (self.bits - 1), dtype=dtype)
        return self.zero.to(dtype)

    def nearest(self, weight: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "rows columns"]:
        """The codes of the levels nearest to a weight; halves go to the even one."""
        weight = wide(weight)
        codes = nearest_codes(
            in_groups(weight, self.group),
            self.scales.values()[..., None].to(weight.dtype),
            self.zeros(weight.dtype)[..., None],
            self.top,
        )
        return codes.to(torch.uint8).flatten(1)[:, : weight.shape[1]]

    def levels(self, codes: UInt8[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """What codes stand for, exactly, in float32."""
        values = in_groups(codes, self.group).float()
        values.sub_(2 ** (self.bits - 1) if self.zero is None else self.zero[..., None])
        return values.mul_(self.scales.values()[..., None]).flatten(1)[:, : codes.shape[1]]


def nearest_codes(values: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """clamp(round(w / s) + z, 0, top), in the dtype of `values`.  Whoever rounds goes through here, bit for bit."""
    return (values / scales).round_().add_(zeros).clamp_(0, top)


def wide(weight: Tensor) -> Tensor:
    """In float32 or better: scales computed in 16 bits would be off by more than the rounding that they cause."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def group_size(columns: int, group: int) -> int:
    """Columns of a full group."""
    return min(group, columns) if group else columns


def group_count(columns: int, group: int) -> int:
    return -(-columns // group_size(columns, group))


def in_groups(x: Tensor, group: int) -> Tensor:
    """``[rows, columns]`` → ``[rows, groups, size]``, zeros behind a last group that is smaller.  They disturb nothing:
    every range holds zero, and zero is a level."""
    rows, columns = x.shape
    size, count = group_size(columns, group), group_count(columns, group)
    return (
        pad(x, (0, count * size - columns)).view(rows, count, size) if columns % size else x.reshape(rows, count, size)
    )


def fit_grid(
    weight: Float[Tensor, "rows columns"],
    bits: int,
    group: int = 0,
    form: Form = "asymmetric",
    *,
    shrink: bool = False,
    format: ScaleFormat = "float16",
) -> Grid:
    """The grid that spans each group, or with `shrink` the part of it that rounds best.

    The search multiplies both ends of a group by 1, 0.99, ..., 0.21 and keeps the factor with the least Σ|w - w'|^2.4.
    Raises NumericalError for a weight that is not finite.
    """
    groups = in_groups(wide(weight), group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if form != "asymmetric":
        high = torch.maximum(-low, high)
        low = -high
    grid = _between(low, high, bits, group, form, format, None)
    if not shrink:
        return grid

    def off(other: Grid) -> Tensor:
        lost = wide(weight) - other.levels(other.nearest(weight))
        return in_groups(lost.abs_().pow_(SHRINK_NORM), group).sum(-1)

    least, raw, zero = off(grid), grid.scales.raw.clone(), None if grid.zero is None else grid.zero.clone()
    for factor in SHRINKS:
        other = _between(low * factor, high * factor, bits, group, form, format, grid.scales.exponent)
        error = off(other)
        better = error < least
        least = torch.where(better, error, least)
        raw = torch.where(better, other.scales.raw, raw)
        if zero is not None and other.zero is not None:
            zero = torch.where(better, other.zero, zero)
    return Grid(bits, group, Scales(raw, format, grid.scales.exponent), zero)


def _between(
    low: Tensor, high: Tensor, bits: int, group: int, form: Form, format: ScaleFormat, exponent: int | None
) -> Grid:
    """The grid from `low` to `high`, each ``[rows, groups]``."""
    if form == "asymmetric":
        scales = Scales.of((high - low) / (2**bits - 1), format, exponent)
        zero = (-low / scales.values().to(low.dtype)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        return Grid(bits, group, scales, zero)
    if bits < 2:
        raise ValueError("a symmetric grid of 1 bit has no level beside zero to speak of; wanted 2 bits or more")
    levels = 2 ** (bits - 1) - 1 if form == "symmetric" else (2**bits - 1) / 2
    return Grid(bits, group, Scales.of(high / levels, format, exponent), None)
