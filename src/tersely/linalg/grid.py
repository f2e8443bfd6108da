"""Grids: which numbers a group of weights may take, and which of them is nearest.

Each row of a weight is cut into groups of neighbouring columns, and a group has one scale s and one zero point z.  A
code q of b bits stands for

    (level(q) - z) · s · t_j,

where level(q) = q, or a number from a table (`linalg.levels`), and t_j is a scale of column j, 1 unless columns were
scaled: the grid is then that of W diag(1/t).  Of integers it spans a group in one of three forms:

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
A scale of 11 binary digits times a code of 8 is exact in float32.  Two formats take one byte:

    log8    the bits of a float16, as an integer, are  base + code · step:  the bits of positive floats rise nearly like
            their logarithm, so the steps are nearly even ratios, 2^(step / 1024); base and step are those of the whole
            weight that lose least, Σ s² being what rounding loses.  A scale below the base becomes the base.
    e8m0    2^(code - 127), the shared scale of MX formats

A zero point is a code, or a float16 where a method chooses it freely, or absent: then it is 2^(b-1), and 0 of a table.

A group of zeros has no range; it takes the largest scale of the weight, so that error feedback can use it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self, get_args

import torch
from jaxtyping import Float, Int, Int16, Integer, UInt8
from torch import Tensor
from torch.nn.functional import pad

from tersely.errors import NumericalError
from tersely.kernels import Rounding, best_ranges, nearest_codes
from tersely.linalg.levels import bits_of, levels_of, nearest_levels, reach_of

Form = Literal["asymmetric", "symmetric", "symmetric_full"]
FORMS: tuple[Form, ...] = get_args(Form)

ScaleFormat = Literal["float16", "bfloat16", "float32", "log8", "e8m0"]
SCALE_FORMATS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
    "float32": (torch.float32, torch.int32),
    "log8": (torch.float16, torch.uint8),
    "e8m0": (torch.float32, torch.uint8),
}
"""Format of stored scales → how they are read, how they are kept."""

Ladder = tuple[int, int]
"""Base and step of the format log8."""

BYTE = 255
E8M0_BIAS = 127
NARROWER = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.13, 0.09)
"""Steps of a ladder that are tried, relative to the one that spans all scales of a weight."""

TOP = 15  # the largest scale, times 2^-exponent, lies in [2^14, 2^15]: rounding up never leaves float16
FARTHEST_ZERO = 1024.0
"""A zero point in float16 is not farther from the levels, in steps: there it is off by at most half a step."""

LOWEST_EXPONENT = -102  # the smallest float16 times this power of two is still a normal float32

AT_ONCE = 2**17
"""Weights whose grids HQQ searches for together: what a processor's cache holds of the few tensors that it takes."""
GRIDS_AT_ONCE = 2**21
"""Of groups, when ranges are searched for: a few tensors of so many numbers are in memory."""
SHRINKS = tuple(1 - percent / 100 for percent in range(1, 80))


@dataclass(frozen=True)
class Scales:
    """Scales as they are stored, one for each row and group, or one for each column."""

    raw: Integer[Tensor, "*shape"]
    """The bits of floats in `format`, or codes that stand for them."""
    format: ScaleFormat
    exponent: int
    ladder: Ladder | None = None
    """Of the format log8, and of no other."""

    @classmethod
    def of(cls, wanted: Float[Tensor, "*shape"], format: ScaleFormat = "float16", exponent: int | None = None) -> Self:
        """The nearest stored scales that are not smaller than those wanted.  Those of zero become the largest one.

        `exponent`: None chooses it by the largest scale, for e8m0 it is 0 then.
        """
        largest = wanted.max()
        if not torch.isfinite(largest):
            raise NumericalError(
                "the weight has entries that are not finite; repair the checkpoint before compressing it"
            )
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        wanted = torch.where(wanted > 0, wanted, largest)
        if format == "e8m0":
            mantissa, power = torch.frexp(wanted * 2.0 ** -(exponent or 0))
            power = power - (mantissa == 0.5).to(power.dtype)  # frexp writes 2^n as 0.5 · 2^(n + 1)
            return cls((power + E8M0_BIAS).clamp_(0, BYTE - 1).to(torch.uint8), format, exponent or 0)
        if exponent is None:
            exponent = max(int(torch.frexp(largest).exponent) - TOP, LOWEST_EXPONENT)
        read, kept = SCALE_FORMATS["float16" if format == "log8" else format]
        wanted = wanted * 2.0**-exponent
        rounded = wanted.to(read)
        # one more in the last place of a positive float is one more in its bits
        raw = rounded.view(kept) + (rounded.to(wanted.dtype) < wanted).to(kept)
        if format != "log8":
            return cls(raw, format, exponent)
        bits = raw.int()
        base, step = ladder = _ladder(bits)
        return cls(((bits - base + step - 1) // step).clamp_(0, BYTE).to(torch.uint8), format, exponent, ladder)

    def values(self) -> Float[Tensor, "*shape"]:
        """In float32."""
        if self.format == "e8m0":
            return torch.ldexp(
                torch.ones_like(self.raw, dtype=torch.float32), self.raw.int() - E8M0_BIAS + self.exponent
            )
        raw = self.raw
        if self.ladder is not None:
            base, step = self.ladder
            raw = (self.raw.int() * step + base).to(torch.int16)
        return raw.view(SCALE_FORMATS[self.format][0]).float() * 2.0**self.exponent


def _ladder(bits: Int[Tensor, "*shape"]) -> Ladder:
    """The rungs base, base + step, ..., base + 255 step that float16 scales with these bits lose least by being raised
    to.  All reach the highest; the finer ones do not go down to the lowest."""
    lowest, highest = int(bits.min()), int(bits.max())
    widest = max(1, -(-(highest - lowest) // BYTE))
    best: tuple[float, Ladder] | None = None
    for step in sorted({max(1, round(share * widest)) for share in NARROWER}, reverse=True):
        base = max(lowest, highest - BYTE * step)
        raised = ((bits - base + step - 1) // step).clamp_(min=0) * step + base
        lost = float(raised.to(torch.int16).view(torch.float16).double().square().sum())
        if best is None or lost < best[0]:
            best = lost, (base, step)
    assert best is not None
    return best[1]


@dataclass(frozen=True)
class Grid:
    """The levels of a weight."""

    bits: int
    group: int
    """Neighbouring columns that share a scale; 0 for all of a row.  The last group of a row may be smaller."""
    scales: Scales
    zero: UInt8[Tensor, "rows groups"] | Int16[Tensor, "rows groups"] | None
    """What stands for 0: a code, or the bits of a float16; None for 2^(bits - 1) throughout, or for 0 of a table."""
    table: str | None = None
    """Name of the table of levels; None for the integers."""
    columns: Scales | None = None
    """Scales of the columns, in float16; None where they are 1."""

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def integers(self) -> bool:
        """Levels are 0 to `top`."""
        return self.table is None

    @property
    def free(self) -> bool:
        """Zero points are no codes."""
        return self.zero is not None and self.zero.dtype != torch.uint8

    def zeros(self, dtype: torch.dtype) -> Float[Tensor, "rows groups"]:
        """The code or level that stands for 0, everywhere."""
        if self.zero is None:
            middle = 2 ** (self.bits - 1) if self.table is None else 0
            return torch.full_like(self.scales.raw, middle, dtype=dtype)
        return (self.zero if self.zero.dtype == torch.uint8 else self.zero.view(torch.float16)).to(dtype)

    def nearest(self, weight: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "rows columns"]:
        """The codes of the levels nearest to a weight; of integers halves go to the even one."""
        weight = without_columns(wide(weight), self.columns)
        codes = self.codes(
            in_groups(weight, self.group),
            self.scales.values()[..., None].to(weight.dtype),
            self.zeros(weight.dtype)[..., None],
        )
        return codes.to(torch.uint8).flatten(1)[:, : weight.shape[1]]

    def codes(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The codes nearest to values whose columns are not scaled, with these scales and zero points; of integers in
        the dtype of the values.  Whoever rounds goes through here, bit for bit."""
        if self.table is None:
            return nearest_codes(values, scales, zeros, self.top, free=self.free)
        return nearest_levels((values / scales).add_(zeros), self.table)

    def placed(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes → the numbers in their places, zero points and scales left out."""
        if self.table is None:
            return codes.to(dtype)
        return levels_of(self.table, dtype, codes.device)[codes.int()]

    def rounding(self, weight: Float[Tensor, "rows columns"], order: Int[Tensor, " columns"]) -> Rounding:
        """Laid out for a sweep over the columns of a weight in some order."""
        return Rounding(
            self,
            group_size(weight.shape[1], self.group),
            order.cpu().contiguous(),
            self.scales.values().to(weight.dtype).T.contiguous(),
            self.zeros(weight.dtype).T.contiguous(),
            None if self.columns is None else self.columns.values().to("cpu", weight.dtype).contiguous(),
            torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device),
        )

    def levels(self, codes: UInt8[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """What codes stand for, exactly, in float32."""
        values = in_groups(self.placed(codes, torch.float32), self.group)
        if self.zero is not None or self.table is None:
            values.sub_(self.zeros(torch.float32)[..., None])
        values = values.mul_(self.scales.values()[..., None]).flatten(1)[:, : codes.shape[1]]
        return values if self.columns is None else values * self.columns.values()


def without_columns(weight: Float[Tensor, "rows columns"], columns: Scales | None) -> Float[Tensor, "rows columns"]:
    """W diag(1/t), which is what scales and zero points are fitted to."""
    return weight if columns is None else weight / columns.values().to(weight.dtype)


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
    columns: Scales | None = None,
) -> Grid:
    """The grid of integers that spans each group, or with `shrink` the part of it that rounds best.

    The search multiplies both ends of a group by 1, 0.99, ..., 0.21 and keeps the factor with the least Σ|w - w'|^2.4;
    scales in a byte are made of the ones that it finds.
    Raises NumericalError for a weight that is not finite.
    """
    scaled = without_columns(wide(weight), columns)
    groups = in_groups(scaled, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if form != "asymmetric":
        high = torch.maximum(-low, high)
        low = -high
    if not shrink:
        return Grid(bits, group, *_between(low, high, bits, form, format, None), None, columns)
    searched: ScaleFormat = "float16" if SCALE_FORMATS[format][1] == torch.uint8 else format
    exponent = _between(low, high, bits, form, searched, None)[0].exponent
    rows = max(1, GRIDS_AT_ONCE // max(1, len(SHRINKS) * low.shape[1]))
    size = group_size(scaled.shape[1], group)
    between = partial(_between, bits=bits, form=form, format=searched, exponent=exponent)
    parts = [
        _shrunk(*part, bits, size, between)
        for part in zip(scaled.split(rows), low.split(rows), high.split(rows), strict=True)
    ]
    scales = Scales(torch.cat([scales.raw for scales, _ in parts]), searched, exponent)
    zeros = [zero for _, zero in parts if zero is not None]
    kept = scales if searched == format else Scales.of(scales.values(), format)
    return Grid(bits, group, kept, torch.cat(zeros) if zeros else None, None, columns)


Ranges = tuple[Scales, Tensor | None]
"""Scales and zero points of some groups, of any shape."""


def _shrunk(
    weight: Float[Tensor, "rows columns"],
    low: Float[Tensor, "rows groups"],
    high: Float[Tensor, "rows groups"],
    bits: int,
    size: int,
    between: Callable[[Tensor, Tensor], Ranges],
) -> Ranges:
    """Of some rows, the best factor of every group."""
    factors = torch.tensor((1.0, *SHRINKS), dtype=low.dtype, device=low.device)[:, None, None]
    tried, zero = between(low * factors, high * factors)
    scales = tried.values().to(weight.dtype)
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if zero is None else zero.to(weight.dtype)
    best = best_ranges(weight, scales, zeros, size=size, top=2**bits - 1)[None]
    return replace(tried, raw=tried.raw.gather(0, best)[0]), None if zero is None else zero.gather(0, best)[0]


def _between(low: Tensor, high: Tensor, bits: int, form: Form, format: ScaleFormat, exponent: int | None) -> Ranges:
    """The grid from `low` to `high`."""
    if form == "asymmetric":
        scales = Scales.of((high - low) / (2**bits - 1), format, exponent)
        return scales, (-low / scales.values().to(low.dtype)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits < 2:
        raise ValueError("a symmetric grid of 1 bit has no level beside zero to speak of; wanted 2 bits or more")
    levels = 2 ** (bits - 1) - 1 if form == "symmetric" else (2**bits - 1) / 2
    return Scales.of(high / levels, format, exponent), None


def fit_table(
    weight: Float[Tensor, "rows columns"],
    table: str,
    group: int = 0,
    *,
    shift: bool = False,
    format: ScaleFormat = "float16",
    columns: Scales | None = None,
) -> Grid:
    """A table of levels whose largest is the largest |w| of each group, or with `shift` the largest |w - mean|: the
    mean is then at level 0, by way of a zero point in float16.

    Raises NumericalError for a weight that is not finite.
    """
    groups = in_groups(without_columns(wide(weight), columns), group)
    inside = in_groups(torch.ones_like(weight[:1], dtype=groups.dtype), group)
    mean = groups.sum(-1) / inside.sum(-1) if shift else torch.zeros_like(groups[..., 0])
    largest = ((groups - mean[..., None]) * inside).abs().amax(-1)
    # a group that hardly varies: its zero point must not outgrow the digits of a float16
    largest = torch.maximum(largest, mean.abs() * (reach_of(table) / FARTHEST_ZERO))
    scales = Scales.of(largest / reach_of(table), format)
    zero = float_zeros(-mean / scales.values().to(mean.dtype)) if shift else None
    return Grid(bits_of(table), group, scales, zero, table, columns)


def float_zeros(wanted: Float[Tensor, "rows groups"]) -> Int16[Tensor, "rows groups"]:
    """Zero points that are no codes, as they are stored: the bits of the nearest float16."""
    return wanted.clamp(-FARTHEST_ZERO, FARTHEST_ZERO).to(torch.float16).view(torch.int16)
