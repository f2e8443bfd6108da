"""What a part of a model can become.

A kind is an `nn.Module` that describes itself in plain values (`spec`), is rebuilt from them on any device
(`from_spec`) and knows its bytes; a linear kind can also say which dense weight it stands for.  Kinds nest: the
children of a kind may be kinds, each with an entry of its own in the manifest, the outer one first.

Every linear kind reserves the stock name ``weight`` with a tensor of no elements.  A reader that knows nothing of
tersely finds the name it expects with an impossible shape, and refuses the checkpoint; without this guard transformers
would warn about an unknown quantization method, fill the weight with random numbers, and go on.  It costs no bytes but
its name in the header.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

Spec = dict[str, Any]  # plain JSON values; the key "kind" names the class in KINDS


class Kind(nn.Module, ABC):
    """A module that a checkpoint of ours can hold."""

    name: str  # key of the table KINDS

    @abstractmethod
    def spec(self) -> Spec:
        """Plain values from which `from_spec` rebuilds the module, without its numbers and without its children that
        are kinds."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: Spec) -> Self:
        """The module with uninitialised numbers, on the current default device and dtype."""

    def nbytes(self) -> int:
        """Bytes of all stored numbers, bias included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())


class LinearKind(Kind):
    """y = x W'ᵀ + b for some compressed W' of shape ``[out_features, in_features]``."""

    weight: Tensor
    packed: ClassVar[bool] = False
    """Its tensors are codes, several or parts of one to an element: parameters are counted by what they stand for."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.empty(0))

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]: ...

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "out in"]:
        """The weight that this module stands for, in float32 or better."""

    @abstractmethod
    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        """Take over the bias of the linear that this module replaces, in the module's dtype."""


def dense_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear, plain or of a kind, in float32 or better."""
    if isinstance(module, LinearKind):
        return module.to_dense()
    weight = module.get_parameter("weight").detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
