"""Factors of one byte and of two: r · max(m, n) words of 16 bits for a weight of shape (m, n) and rank r.

In 16 bits, factors take r (m + n) words; above r = m n / (m + n) that is more than the weight itself, and half of a
square weight's ranks can never be used.  Singular vectors, however, round well.  With n = min(m, n) the shorter side, a
component u vᵀ is stored as

    the n entries of the shorter vector, and the first n of the longer one   8 bits each (`linalg.codebook`)
    the other |m - n| entries of the longer one                              16 bits each

that is 2 n + 2 |m - n| = 2 max(m, n) bytes: full rank costs what the weight costs in 16 bits, and every rank from 1 to
min(m, n) has its own size in between.  Each vector is divided by its largest entry first.  What the two were divided by
only ever occurs as a product, so one scale is stored for a component, in bfloat16 times one power of two for the whole
weight (`linalg.grid.Scales`); the paper stores two.  Altogether

    2 r max(m, n) + 2 r   bytes,

whatever the dtype of the model: of a float32 model full rank takes half of the weight's bytes.  The 16 bits are those
of a float16, which after the division has 11 binary digits to the end.

Rounding feeds back.  The vectors of the output side are rounded first, to û_i.  The vectors of the input side are then
not those that were meant for the exact u_i but, one after the other, the best for what is there: v_i = û_iᵀ R_i /
‖û_i‖², with R_i the weight less the components before it as they are stored.  This is a projection in the space of
outputs, the best one in every metric of the inputs; a component repairs what rounding did to those before it, as far
as its own direction goes.  The components of a smaller rank are the first of those of a larger one.

All tensors but the bias are integers: casting a model cannot change them.  A product decodes both factors and nothing
larger.  As no linear is left inside, there is nothing that a later step could compress again.

Source: Wang et al., Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives, 2025, section 3.3
(arXiv 2502.02723); the feedback is ours.
"""

from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from tersely.errors import CheckpointError, NumericalError
from tersely.kinds.base import LinearKind, Spec
from tersely.linalg.codebook import levels_of, nearest_level
from tersely.linalg.grid import Scales


class RemappedLinear(LinearKind):
    """W' = up · diag(scales) · down, with the entries of both factors between -1 and 1."""

    name = "remapped"
    packed: ClassVar[bool] = True

    up: Tensor
    down: Tensor
    rest: Tensor
    scales: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, exponent: int = 0, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features)
        short, long = sorted((in_features, out_features))
        if not 1 <= rank <= short:
            raise CheckpointError(
                f"a remapped weight of rank {rank} with {out_features} rows and {in_features} columns; wanted 1 to "
                f"{short}"
            )
        self.rank = rank
        self.exponent = exponent
        self.register_buffer("up", torch.empty(rank, short, dtype=torch.uint8))
        self.register_buffer("down", torch.empty(rank, short, dtype=torch.uint8))
        self.register_buffer("rest", torch.empty(rank, long - short, dtype=torch.int16))
        self.register_buffer("scales", torch.empty(rank, 1, dtype=torch.int16))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "out in"],
        up: Float[Tensor, "out rank"],
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The best module whose output directions are those of `up`, rounded; `dtype` (default: the weight's) is that
        of a bias.

        Where the columns of `up` are orthonormal and ordered, so are its components, up to rounding.
        Raises NumericalError for entries that are not finite.
        """
        if not (torch.isfinite(weight).all() and torch.isfinite(up).all()):
            raise NumericalError("the weight has entries that are not finite; repair the checkpoint before compressing")
        short = min(weight.shape)
        sides = up.detach().double().T
        largest = sides.abs().amax(1, keepdim=True)
        output_codes, output_rest, outputs = _rounded(sides / torch.where(largest > 0, largest, 1.0), short)
        input_codes, input_rest, scales = _fitted(outputs, weight.detach().double(), short)
        with torch.device("meta"):
            module = cls(weight.shape[1], weight.shape[0], up.shape[1], exponent=scales.exponent)
        module.weight = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        module.up, module.down, module.scales = output_codes, input_codes, scales.raw
        module.rest = output_rest if weight.shape[0] > weight.shape[1] else input_rest
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.bias = nn.Parameter(bias.detach().to(self.weight, copy=True))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        up, scale, down = self.factors()
        root = scale.sqrt()[:, None]  # half of it on either side: a whole one may be too small for a float16
        down, up = (down * root).to(x.dtype), (up * root).to(x.dtype)
        return functional.linear(functional.linear(x, down), up.T, self.bias)

    def factors(self) -> tuple[Float[Tensor, "rank out"], Float[Tensor, " rank"], Float[Tensor, "rank in"]]:
        """Output sides, scales and input sides of the components, in float32."""
        up, down = levels_of(self.up), levels_of(self.down)
        rest = self.rest.view(torch.float16).float()
        if self.out_features > self.in_features:
            up = torch.cat([up, rest], 1)
        else:
            down = torch.cat([down, rest], 1)
        return up, Scales(self.scales, "bfloat16", self.exponent).values()[:, 0], down

    def to_dense(self) -> Float[Tensor, "out in"]:
        up, scale, down = self.factors()
        return (up.T * scale) @ down

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "exponent": self.exponent,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(
            spec["in_features"], spec["out_features"], spec["rank"], exponent=spec["exponent"], bias=spec["bias"]
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def remapped_bytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes of a weight of `shape` (out, in) as this kind."""
    return 2 * rank * max(shape) + 2 * rank


def _rounded(
    rows: Float[Tensor, "rank width"], short: int
) -> tuple[UInt8[Tensor, "rank short"], Int[Tensor, "rank rest"], Float[Tensor, "rank width"]]:
    """Entries between -1 and 1 as they are stored: codes, bits, and what both stand for."""
    codes = nearest_level(rows[:, :short].contiguous())
    rest = rows[:, short:].half().contiguous()
    return codes, rest.view(torch.int16), torch.cat([levels_of(codes, rows.dtype), rest.to(rows.dtype)], 1)


def _fitted(
    outputs: Float[Tensor, "rank out"], weight: Float[Tensor, "out in"], short: int
) -> tuple[UInt8[Tensor, "rank short"], Int[Tensor, "rank rest"], Scales]:
    """Input sides, chosen one after the other for the output sides as they are stored."""
    products, overlaps = outputs @ weight, outputs @ outputs.T
    if not torch.isfinite(products).all():
        raise NumericalError("the product of factors and weight overflows float64; a scale is wrong by far")
    own = overlaps.diagonal()
    inverse = torch.where(own > 0, 1 / own, torch.zeros_like(own))
    exponent = Scales.of((products * inverse[:, None]).abs().max().reshape(1, 1), "bfloat16").exponent
    values = torch.zeros_like(products)
    codes, rest, scales = [], [], []
    for i in range(len(products)):
        wanted = (products[i] - overlaps[i, :i] @ values[:i]) * inverse[i]
        scale = Scales.of(wanted.abs().max().reshape(1, 1), "bfloat16", exponent)
        unit = scale.values().double().item()
        of_row = _rounded((wanted / unit)[None], short)
        codes.append(of_row[0])
        rest.append(of_row[1])
        scales.append(scale.raw)
        values[i] = of_row[2][0] * unit
    return torch.cat(codes), torch.cat(rest), Scales(torch.cat(scales), "bfloat16", exponent)
