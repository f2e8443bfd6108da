"""What a linear can become.

A kind is an `nn.Module` that describes itself in plain values (`spec`), is rebuilt from them on any device
(`from_spec`), knows its bytes, and can say which dense weight it stands for.

Every kind reserves the stock name ``weight`` with a tensor of no elements.  A reader that knows nothing of tersely
finds the name it expects with an impossible shape, and refuses the checkpoint; without this guard transformers would
warn about an unknown quantization method, fill the weight with random numbers, and go on.  It costs no bytes but its
name in the header.
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

Spec = dict[str, Any]  # plain JSON values; the key "kind" names the class in KINDS


class LinearKind(nn.Module, ABC):
    """y = x W'ᵀ + b for some compressed W' of shape ``[out_features, in_features]``."""

    name: str  # key of the table KINDS
    weight: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.empty(0))

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]: ...

    @abstractmethod
    def spec(self) -> Spec:
        """Plain values from which `from_spec` rebuilds the module, without its numbers."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: Spec) -> Self:
        """The module with uninitialised numbers, on the current default device and dtype."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "out in"]:
        """The weight that this module stands for, in float32 or better."""

    @abstractmethod
    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        """Take over the bias of the linear that this module replaces, in the module's dtype."""

    def nbytes(self) -> int:
        """Bytes of all stored numbers, bias included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())
