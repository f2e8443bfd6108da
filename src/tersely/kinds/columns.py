"""Linear kinds side by side: each reads some of the input's channels, and what they say is added up.

    y = Σ_s part_s(x[order_s]) + b,        W'[:, order_s] = part_s

The parts have the same outputs and split the columns among them.  A weight whose columns are worth different numbers of
bits becomes a part for every width: within it all is uniform, as every kernel wants it, and the input is permuted once.

`order` holds the columns of part 0, then those of part 1, and so on.  Its numbers are integers without a sign in the
least of 8, 16 or 32 bits that reaches the last column: it costs  in,  2 in  or  4 in  bytes, whatever the number of
rows.  The parts are children ``parts.0``, ``parts.1``, …, each a plain `nn.Linear` or a linear kind with an entry of
its own in the manifest.  None of them has a bias: that belongs to all and sits beside them.
"""

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tersely.errors import CheckpointError
from tersely.kinds.base import LinearKind, Spec, dense_weight
from tersely.linalg.packing import index_dtype, narrowed, widened


class ColumnsLinear(LinearKind):
    """W'[:, order_s] = part_s."""

    name = "columns"

    order: Tensor

    def __init__(self, parts: Sequence[int], out_features: int, *, bias: bool = False) -> None:
        """`parts`: how many columns each of them has."""
        if not parts or min(parts) < 1:
            raise CheckpointError(f"parts of {list(parts)} columns; wanted one part or more, each of a column or more")
        super().__init__(sum(parts), out_features)
        self.parts = nn.ModuleList(nn.Linear(columns, out_features, bias=False) for columns in parts)
        self.register_buffer("order", torch.empty(self.in_features, dtype=index_dtype(self.in_features - 1)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def of(cls, parts: Sequence[nn.Module], order: Int[Tensor, " in"], dtype: torch.dtype) -> Self:
        """These very modules, plain linears or linear kinds without a bias; nothing is copied.

        order: the columns of the first part, then those of the second, and so on.
        dtype: that of the weight they replace together, for a bias.
        """
        shapes = [_shape(part) for part in parts]
        if len({rows for rows, _ in shapes}) != 1:
            raise CheckpointError(f"parts of the shapes {shapes}; wanted one or more, all with the same outputs")
        if any(_has_bias(part) for part in parts):
            raise CheckpointError("a part of a weight has a bias; wanted it beside the parts")
        width = sum(columns for _, columns in shapes)
        if sorted(order.tolist()) != list(range(width)):
            raise CheckpointError(f"an order that does not name each of {width} columns once")
        with torch.device("meta"):
            module = cls([columns for _, columns in shapes], shapes[0][0])
        module.parts = nn.ModuleList(parts)
        module.order = narrowed(order, width - 1)
        module.weight = torch.empty(0, dtype=dtype, device=order.device)
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.bias = nn.Parameter(bias.detach().to(self.weight, copy=True))

    def places(self) -> Int[Tensor, " in"]:
        """The columns of every part, one part after the other."""
        return widened(self.order)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        first, *others = x.index_select(-1, self.places()).split(self._widths(), -1)
        y = self.parts[0](first)
        for part, read in zip(self.parts[1:], others, strict=True):
            y = y + part(read)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> Float[Tensor, "out in"]:
        together = torch.cat([dense_weight(part) for part in self.parts], 1)
        return torch.empty_like(together).index_copy_(1, self.places(), together)

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "parts": self._widths(),
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        if sum(spec["parts"]) != spec["in_features"]:
            raise CheckpointError(f"parts of {spec['parts']} columns for {spec['in_features']} in all")
        return cls(spec["parts"], spec["out_features"], bias=spec["bias"])

    def _widths(self) -> list[int]:
        return [_shape(part)[1] for part in self.parts]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def order_bytes(in_features: int) -> int:
    """What the order of so many columns takes."""
    return in_features * index_dtype(in_features - 1).itemsize


def _shape(part: nn.Module) -> tuple[int, int]:
    """(out, in) of a part.  Raises CheckpointError for what is neither a linear nor a linear kind."""
    if not isinstance(part, nn.Linear | LinearKind):
        raise CheckpointError(f"a part of class {type(part).__name__}; wanted nn.Linear or a linear kind")
    return part.out_features, part.in_features


def _has_bias(part: nn.Module) -> bool:
    return bool(part.spec()["bias"]) if isinstance(part, LinearKind) else getattr(part, "bias", None) is not None
