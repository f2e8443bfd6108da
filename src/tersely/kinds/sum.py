"""A weight as a sum of terms: W' = Σ_i T_i, and the output is the sum of their outputs.

The first term is usually a weight that stays what it is (dense, or quantized), the others are small updates of it: the
factors of a fine-tuned model's difference, an adapter, a low-rank correction of what rounding lost.  Keeping them apart
costs an addition per term and lets the first be shared, frozen, or stored somewhere else.

The terms are children ``terms.0``, ``terms.1``, …, each a plain `nn.Linear` or a linear kind with an entry of its own
in the manifest.  The bias, where there is one, sits in term 0 alone.
"""

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersely.errors import CheckpointError
from tersely.kinds.base import LinearKind, Spec, dense_weight


class SumLinear(LinearKind):
    """W' = Σ_i T_i."""

    name = "sum"

    def __init__(self, in_features: int, out_features: int, terms: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        if terms < 1:
            raise CheckpointError(f"a sum of {terms} terms; wanted at least one")
        self.has_bias = bias
        self.terms = nn.ModuleList(
            nn.Linear(in_features, out_features, bias=bias and not index) for index in range(terms)
        )

    @classmethod
    def of(cls, terms: Sequence[nn.Module]) -> Self:
        """The sum of these very modules, plain linears or linear kinds; nothing is copied."""
        if not terms:
            raise CheckpointError("a sum of no terms; wanted at least one")
        shapes = {_shape(term) for term in terms}
        if len(shapes) > 1:
            raise CheckpointError(f"the terms of a sum have the shapes {sorted(shapes)}; wanted one (out, in) for all")
        if any(_has_bias(term) for term in terms[1:]):
            raise CheckpointError("a bias in a later term of a sum; wanted it in the first alone")
        ((rows, columns),) = shapes
        with torch.device("meta"):
            module = cls(columns, rows, len(terms), bias=_has_bias(terms[0]))
        module.terms = nn.ModuleList(terms)
        first = next((tensor for tensor in terms[0].state_dict().values() if tensor.is_floating_point()), None)
        module.weight = torch.empty(0) if first is None else first.new_empty(0)
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        first = self.terms[0]
        if isinstance(first, LinearKind):
            first.set_bias(bias)
        else:
            first.bias = nn.Parameter(bias.detach().to(first.get_parameter("weight"), copy=True))
        self.has_bias = True

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.terms[0](x)
        for term in self.terms[1:]:
            y = y + term(x)
        return y

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "terms": len(self.terms),
            "bias": self.has_bias,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(spec["in_features"], spec["out_features"], spec["terms"], bias=spec["bias"])

    def to_dense(self) -> Float[Tensor, "out in"]:
        total = dense_weight(self.terms[0])
        for term in self.terms[1:]:
            total = total + dense_weight(term)
        return total

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _shape(term: nn.Module) -> tuple[int, int]:
    """(out, in) of a term.  Raises CheckpointError for what is neither a linear nor a linear kind."""
    if not isinstance(term, nn.Linear | LinearKind):
        raise CheckpointError(f"a term of class {type(term).__name__}; wanted nn.Linear or a linear kind")
    return term.out_features, term.in_features


def _has_bias(term: nn.Module) -> bool:
    if isinstance(term, LinearKind):
        return bool(term.spec()["bias"])
    return term.get_parameter("weight") is not None and getattr(term, "bias", None) is not None
