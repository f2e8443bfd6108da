"""A weight as sums of vectors out of a few codebooks: AQLM's format.

    W'[i, jg:(j+1)g] = 2^e · scale[i] · Σ_m codebooks[m, code[i, j, m]]

The codes of a row lie packed at exactly `bits` bits each, 1 to 16 (`linalg.packing`): those above 8 bits as a plane of
their low bytes and, behind it, a plane of what is left.  Codebooks ``[M, 2^bits, g]`` and scales, one a row, are
parameters in the weight's dtype: whatever trains a model trains them, while the codes stay.  They are of the order of
1, as the power of two, e, is taken out; so float16 does not run out of range, and one learning rate suits both.

    out · ⌈⌈in / g⌉ · M · bits / 8⌉  bytes for codes,   M · 2^bits · g · itemsize  for codebooks,   out · itemsize

for scales.  Where g does not divide the width, the last group of a row is coded whole, and what lies beyond is cut off.

Two ways to the product.  Of many tokens: decode the weight, multiply.  Of few, as in generating: a codeword is
multiplied once with each group of the input, and a row then adds up  ⌈in / g⌉ · M  numbers of that table, instead of
decoding and multiplying g times as many.  The table takes  in · M · 2^bits  multiplications for a token.

Source: Egiazarian et al., Extreme Compression of Large Language Models via Additive Quantization, 2024, section 3.2 and
appendix H (arXiv 2401.06118); packing and the power of two are ours.
"""

from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad

from tersely.errors import CheckpointError
from tersely.kinds.base import LinearKind, Spec
from tersely.linalg.additive import gathered
from tersely.linalg.packing import pack, packed_bytes, unpack

WIDEST = 16
"""Bits of a code at most."""

BYTE = 8

FEW_TOKENS = 4
"""Up to so many, the product goes by the table: 13 times as fast for one, 1.8 times for four (4096 x 4096 of 2 books of
8 bits, one thread); its time grows with their number, that of decoding does not."""


class CodebookLinear(LinearKind):
    """W' = sums of codewords, times the scale of the row."""

    name = "codebook"
    packed: ClassVar[bool] = True

    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codebooks: int,
        bits: int,
        group: int,
        *,
        exponent: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features)
        if codebooks < 1 or bits not in range(1, WIDEST + 1) or group < 1:
            raise CheckpointError(
                f"{codebooks} codebooks with codes of {bits} bits for groups of {group}; wanted 1 or more codebooks, 1 "
                f"to {WIDEST} bits, and groups of 1 or more columns"
            )
        self.bits = bits
        self.group = group
        self.exponent = exponent
        count = group_count(in_features, group) * codebooks
        self.register_buffer("codes", torch.empty(out_features, packed_bytes(count, bits), dtype=torch.uint8))
        self.codebooks = nn.Parameter(torch.empty(codebooks, 2**bits, group))
        self.scales = nn.Parameter(torch.empty(out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def of(
        cls,
        codes: Int[Tensor, "out groups books"],
        codebooks: Float[Tensor, "books entries group"],
        scales: Float[Tensor, " out"],
        in_features: int,
        *,
        exponent: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A module of copies, numbers in `dtype` (default: that of the codebooks).

        Raises ValueError where the number of codewords is no power of two, or shapes do not fit.
        """
        books, entries, group = codebooks.shape
        bits = entries.bit_length() - 1
        if entries != 2**bits or codes.shape[1:] != (group_count(in_features, group), books):
            raise ValueError(
                f"codes {tuple(codes.shape)} and codebooks {tuple(codebooks.shape)} for {in_features} columns; wanted "
                "codes [out, groups, books], and as many codewords as a power of two"
            )
        dtype = dtype or codebooks.dtype
        with torch.device("meta"):
            module = cls(in_features, len(codes), books, bits, group, exponent=exponent)
        module.weight = torch.empty(0, dtype=dtype, device=codes.device)
        module.codes = packed(codes.flatten(1), bits)
        module.codebooks = nn.Parameter(codebooks.detach().to(dtype, copy=True).contiguous())
        module.scales = nn.Parameter(scales.detach().to(dtype, copy=True).contiguous())
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.bias = nn.Parameter(bias.detach().to(self.codebooks, copy=True))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if 0 < x.numel() <= FEW_TOKENS * self.in_features and 2**self.bits <= self.out_features:
            return self._looked_up(x)
        return functional.linear(x, self.decoded().to(x.dtype), self.bias)

    def _looked_up(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product without the weight, by a table of groups of the input times codewords."""
        wide = torch.promote_types(self.codebooks.dtype, torch.float32)
        books, entries, group = self.codebooks.shape
        groups = group_count(self.in_features, group)
        tokens = pad(x.reshape(-1, self.in_features).to(wide), (0, groups * group - self.in_features))
        table = torch.einsum("tjg,meg->jmet", tokens.unflatten(1, (groups, group)), self.codebooks.to(wide))
        places = torch.arange(groups * books, dtype=torch.int32, device=x.device).view(groups, books) * entries
        found = table.flatten(0, 2).index_select(0, (self.unpacked() + places).flatten())
        product = found.view(self.out_features, groups * books, len(tokens)).sum(1).T * self._row_scales(wide)
        y = product.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _row_scales(self, dtype: torch.dtype) -> Float[Tensor, " out"]:
        return self.scales.to(dtype) * 2.0**self.exponent

    def unpacked(self) -> Int[Tensor, "out groups books"]:
        """The codes, as indices of codewords."""
        books, _, group = self.codebooks.shape
        groups = group_count(self.in_features, group)
        return unpacked(self.codes, self.bits, groups * books).view(-1, groups, books)

    def decoded(self) -> Float[Tensor, "out in"]:
        """The weight, in float32 or better, through which gradients reach codebooks and scales."""
        wide = torch.promote_types(self.codebooks.dtype, torch.float32)  # where gradients of a codeword add up too
        rows = gathered(self.codebooks.to(wide), self.unpacked())[:, : self.in_features]
        return rows * self._row_scales(wide)[:, None]

    def to_dense(self) -> Float[Tensor, "out in"]:
        return self.decoded().detach()

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "codebooks": len(self.codebooks),
            "bits": self.bits,
            "group": self.group,
            "exponent": self.exponent,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(
            spec["in_features"],
            spec["out_features"],
            spec["codebooks"],
            spec["bits"],
            spec["group"],
            exponent=spec["exponent"],
            bias=spec["bias"],
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, codebooks={len(self.codebooks)}, "
            f"bits={self.bits}, group={self.group}"
        )


def codebook_bytes(shape: tuple[int, int], codebooks: int, bits: int, group: int, itemsize: int) -> int:
    """Bytes of a weight of `shape` (out, in) as this kind, with `itemsize` bytes for a number of codebooks and
    scales."""
    rows, columns = shape
    codes = packed_bytes(group_count(columns, group) * codebooks, bits)
    return rows * (codes + itemsize) + codebooks * 2**bits * group * itemsize


def group_count(columns: int, group: int) -> int:
    """Groups of a row, the last one perhaps not full."""
    return -(-columns // group)


def packed(codes: Int[Tensor, "rows count"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Rows of codes below 2^bits at `bits` bits each, 1 to 16."""
    if bits <= BYTE:
        return pack(codes.to(torch.uint8), bits)
    return torch.cat([(codes & 255).to(torch.uint8), pack((codes >> BYTE).to(torch.uint8), bits - BYTE)], 1)


def unpacked(codes: UInt8[Tensor, "rows bytes"], bits: int, count: int) -> Int[Tensor, "rows count"]:
    """What `packed` was given, as int32."""
    if bits <= BYTE:
        return unpack(codes, bits, count).int()
    return codes[:, :count].int() + (unpack(codes[:, count:].contiguous(), bits - BYTE, count).int() << BYTE)
