"""A weight as a product of two thin ones: W' = up · down.

`down` (in → rank) and `up` (rank → out) are plain `nn.Linear`, so that a later step may quantize ``q_proj.down`` like
any other linear.  The bias sits in `up`.
"""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersely.kinds.base import LinearKind, Spec, dense_weight


class LowRankLinear(LinearKind):
    """W' = up · down, two thin linears."""

    name = "low_rank"

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.rank = rank
        self.has_bias = bias
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def from_factors(
        cls,
        up: Float[Tensor, "out rank"],
        down: Float[Tensor, "rank in"],
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A module holding copies of the factors in `dtype` (default: that of the factors)."""
        dtype = dtype or up.dtype
        with torch.device("meta"):
            module = cls(down.shape[1], up.shape[0], up.shape[1])
        module.weight = torch.empty(0, dtype=dtype, device=up.device)
        module.down.weight = nn.Parameter(down.detach().to(dtype, copy=True).contiguous())
        module.up.weight = nn.Parameter(up.detach().to(dtype, copy=True).contiguous())
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.up.bias = nn.Parameter(bias.detach().to(self.up.weight, copy=True))
        self.has_bias = True

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.up(self.down(x))

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.has_bias,  # not read off `up`, which a later step may have replaced
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(spec["in_features"], spec["out_features"], spec["rank"], bias=spec["bias"])

    def to_dense(self) -> Float[Tensor, "out in"]:
        return dense_weight(self.up) @ dense_weight(self.down)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
