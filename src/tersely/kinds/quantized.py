"""A weight as small integers with a scale, and perhaps a zero point, for every row and group of columns.

    W'[i, j] = (level(code[i, j]) - zero[i, j // group]) · scale[i, j // group] · column[j]

`codes` lie packed, `bits` bits each (`linalg.packing`).  They are the levels themselves, or places in a named table of
2^bits levels (`linalg.levels`).  `zeros` are packed codes too, or float16.  `scales` are floats of 16 or 32 bits, or
codes of 8 that stand for floats (`linalg.grid`), times one power of two, `exponent`.  `columns` are float16, and so
that the product is that of the scaled input,  y = (x ⊙ column) [scale · (level(code) - zero)]ᵀ.  What is absent takes
no bytes and has no buffer.

Everything but the bias is integers on purpose: floats lie as the integers that have the same bits, since
``model.half()``, ``.to(torch.bfloat16)`` and ``from_pretrained(dtype=…)`` cast whatever floats, and would round the
scales a second time.  The weight is therefore the same number for number in any dtype, until the product rounds it to
the dtype of its input.

Bytes:  out · ⌈in · bits / 8⌉  for codes,  2 · out · groups  for scales in 16 bits (1 or 4 times for others),
out · ⌈groups · bits / 8⌉  for zero points that are codes,  2 · out · groups  for others,  2 · in  for columns.

The input may be rounded too, to a fixed symmetric grid:  x' = round(clip(x / a, ±1) · n) · a / n,  n = 2^(bits-1) - 1.
This imitates integer arithmetic in floats; gradients pass where the input was not clipped.

In the description `levels` and `columns` (the exponent of the column scales) stand where either is used, and `ladder`
where scales are of the format log8; all others read as they always did.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from tersely.errors import CheckpointError
from tersely.kinds.base import LinearKind, Spec
from tersely.linalg.grid import SCALE_FORMATS, Grid, Ladder, ScaleFormat, Scales, group_count
from tersely.linalg.levels import LEVELS, bits_of
from tersely.linalg.packing import WIDEST, pack, packed_bytes, unpack

INPUT_BITS = range(2, 17)

Zeros = bool | Literal["float16"]
"""Zero points as a description has them: none, codes, or floats."""


class QuantizedLinear(LinearKind):
    """W' = (levels of the codes - zeros) · scales, group by group, perhaps with scales of the columns."""

    name = "quantized"
    packed: ClassVar[bool] = True

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: Tensor | None
    bound: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        *,
        group: int = 0,
        zeros: Zeros = True,
        scale: ScaleFormat = "float16",
        exponent: int = 0,
        ladder: Ladder | None = None,
        levels: str | None = None,
        columns: int | None = None,
        input_bits: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features)
        self.bits = bits
        self.group = group
        self.scale = scale
        self.exponent = exponent
        self.ladder = ladder
        self.levels = levels
        self.column_exponent = columns
        self.input_bits = input_bits
        groups = group_count(in_features, group)
        packed = torch.empty(out_features, packed_bytes(in_features, bits), dtype=torch.uint8)
        self.register_buffer("codes", packed)
        self.register_buffer("scales", torch.empty(out_features, groups, dtype=SCALE_FORMATS[scale][1]))
        if zeros == "float16":
            self.register_buffer("zeros", torch.empty(out_features, groups, dtype=torch.int16))
        else:
            packed = torch.empty(out_features, packed_bytes(groups, bits), dtype=torch.uint8)
            self.register_buffer("zeros", packed if zeros else None)
        self.register_buffer("columns", None if columns is None else torch.empty(in_features, dtype=torch.int16))
        self.register_buffer("bound", None if input_bits is None else torch.empty((), dtype=torch.int32))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def from_codes(cls, codes: UInt8[Tensor, "out in"], grid: Grid, dtype: torch.dtype) -> Self:
        """A module holding the packed codes on `grid`; `dtype` is that of the weight it replaces, for a bias."""
        out_features, in_features = codes.shape
        raw, zero = grid.scales.raw, grid.zero
        if raw.shape != (out_features, group_count(in_features, grid.group)):
            raise ValueError(f"scales {tuple(raw.shape)} for codes {tuple(codes.shape)} in groups of {grid.group}")
        with torch.device("meta"):
            module = cls(
                in_features,
                out_features,
                grid.bits,
                group=grid.group,
                zeros=_zeros_of(zero),
                scale=grid.scales.format,
                exponent=grid.scales.exponent,
                ladder=grid.scales.ladder,
                levels=grid.table,
                columns=None if grid.columns is None else grid.columns.exponent,
            )
        module.weight = torch.empty(0, dtype=dtype, device=codes.device)
        module.codes = pack(codes, grid.bits)
        module.scales = raw.clone()
        if zero is not None:
            module.zeros = pack(zero, grid.bits) if zero.dtype == torch.uint8 else zero.clone()
        if grid.columns is not None:
            module.columns = grid.columns.raw.clone()
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.bias = nn.Parameter(bias.detach().to(self.weight, copy=True))

    def round_input(self, bits: int, bound: float) -> None:
        """From now on round the input to the symmetric grid of so many bits from -`bound` to `bound`."""
        if bits not in INPUT_BITS or not 0 < bound < float("inf"):
            raise ValueError(f"an input of {bits} bits up to {bound}; wanted 2 to 16 bits and a positive bound")
        self.input_bits = bits
        self.bound = torch.tensor(bound, dtype=torch.float32, device=self.codes.device).view(torch.int32)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.input_bits is not None and self.bound is not None:
            x = rounded(x, self.input_bits, self.bound.view(torch.float32))
        return functional.linear(x, self.to_dense().to(x.dtype), self.bias)

    def grid(self, rows: Tensor | None = None) -> Grid:
        """The levels, unpacked; those of some rows (their numbers, shape ``[count]``), or of all."""
        zero, raw = self.zeros, self.scales
        if rows is not None:
            zero, raw = None if zero is None else zero[rows], raw[rows]
        if zero is not None and zero.dtype == torch.uint8:
            zero = unpack(zero, self.bits, group_count(self.in_features, self.group))
        columns = None
        if self.columns is not None and self.column_exponent is not None:
            columns = Scales(self.columns, "float16", self.column_exponent)
        scales = Scales(raw, self.scale, self.exponent, self.ladder)
        return Grid(self.bits, self.group, scales, zero, self.levels, columns)

    def unpacked(self) -> UInt8[Tensor, "out in"]:
        """The codes, one a byte."""
        return unpack(self.codes, self.bits, self.in_features)

    def to_dense(self) -> Float[Tensor, "out in"]:
        return self.grid().levels(self.unpacked())

    def rows(self, places: Int[Tensor, "*places"]) -> Float[Tensor, "*places in"]:
        """Rows of `to_dense` by their numbers; no other row is unpacked."""
        flat = places.flatten()
        found = self.grid(flat).levels(unpack(self.codes[flat], self.bits, self.in_features))
        return found.view(*places.shape, self.in_features)

    def spec(self) -> Spec:
        more: Spec = {}
        if self.levels is not None or self.column_exponent is not None:
            more = {"levels": self.levels, "columns": self.column_exponent}
        if self.ladder is not None:
            more["ladder"] = list(self.ladder)
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group": self.group,
            "zeros": _zeros_of(self.zeros),
            "scale": self.scale,
            "exponent": self.exponent,
            "input": None if self.input_bits is None else {"bits": self.input_bits},
            "bias": self.bias is not None,
        } | more

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        _check(spec, "bits", lambda bits: bits in range(1, WIDEST + 1), f"1 to {WIDEST}")
        _check(spec, "group", lambda group: group >= 0, "0 for whole rows, or the columns of a group")
        _check(spec, "scale", lambda scale: scale in SCALE_FORMATS, " or ".join(SCALE_FORMATS))
        _check(spec, "zeros", lambda zeros: zeros in (True, False, "float16"), "true, false or float16")
        # both or neither: a description that lost one of them must not read as another weight
        further = bool(spec.keys() & {"levels", "columns"})
        levels, columns = (spec["levels"], spec["columns"]) if further else (None, None)
        if levels is not None and (levels not in LEVELS or bits_of(levels) != spec["bits"]):
            raise CheckpointError(f"levels {levels!r} with codes of {spec['bits']} bits; known: {', '.join(LEVELS)}")
        base, step = spec["ladder"] if spec["scale"] == "log8" else (0, 0)
        return cls(
            spec["in_features"],
            spec["out_features"],
            spec["bits"],
            group=spec["group"],
            zeros=spec["zeros"],
            scale=spec["scale"],
            exponent=spec["exponent"],
            ladder=(base, step) if spec["scale"] == "log8" else None,
            levels=levels,
            columns=columns,
            input_bits=spec["input"]["bits"] if spec["input"] else None,
            bias=spec["bias"],
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}"


def quantized_bytes(
    shape: tuple[int, int],
    bits: int,
    group: int,
    *,
    zeros: Zeros,
    scale: ScaleFormat = "float16",
    columns: bool = False,
) -> int:
    """Bytes of a weight of `shape` (out, in) as this kind; `columns`: with scales of the columns."""
    rows, width = shape
    groups = group_count(width, group)
    of_group = SCALE_FORMATS[scale][1].itemsize + (2 if zeros == "float16" else 0)
    of_row = packed_bytes(width, bits) + groups * of_group + (packed_bytes(groups, bits) if zeros is True else 0)
    return rows * of_row + (2 * width if columns else 0)


def _zeros_of(zeros: Tensor | None) -> Zeros:
    return zeros is not None and (zeros.dtype == torch.uint8 or "float16")


class _StraightThrough(torch.autograd.Function):
    """Round; backwards as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def rounded(x: Float[Tensor, "*batch in"], bits: int, bound: Float[Tensor, ""]) -> Float[Tensor, "*batch in"]:
    """The input on its grid, computed in float32 or better and handed on in the dtype it came in."""
    levels = 2 ** (bits - 1) - 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    whole: Tensor = _StraightThrough.apply((wide / bound).clamp(-1, 1) * levels)
    return (whole * (bound / levels)).to(x.dtype)


def _check(spec: Spec, key: str, holds: Callable[[Any], bool], wanted: str) -> None:
    if not holds(spec[key]):
        raise CheckpointError(f"{key} {spec[key]!r} of a quantized module; wanted {wanted}")
