"""A plain linear of a width of its own, for units that were made narrower, and for modules that need a guard.

The weight lies under ``dense.weight``; the stock name ``weight`` holds the guard.  Where a model must not open without
tersely although all its shapes are the stock ones (another position embedding, say), turning one linear of every
changed module into this kind is what makes a stock reader refuse.
"""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersely.kinds.base import LinearKind, Spec, dense_weight


class DenseLinear(LinearKind):
    """W' = W, of whatever width."""

    name = "dense"

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.has_bias = bias
        self.dense = nn.Linear(in_features, out_features, bias=bias)

    @classmethod
    def from_weight(cls, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> Self:
        """A module holding copies, in the weight's dtype."""
        with torch.device("meta"):
            module = cls(weight.shape[1], weight.shape[0])
        module.weight = torch.empty(0, dtype=weight.dtype, device=weight.device)
        module.dense.weight = nn.Parameter(weight.detach().clone().contiguous())
        if bias is not None:
            module.set_bias(bias)
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.dense.bias = nn.Parameter(bias.detach().to(self.dense.weight, copy=True))
        self.has_bias = True

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.dense(x)

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.has_bias,  # not read off `dense`, which a later step may have replaced
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(spec["in_features"], spec["out_features"], bias=spec["bias"])

    def to_dense(self) -> Float[Tensor, "out in"]:
        return dense_weight(self.dense)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
