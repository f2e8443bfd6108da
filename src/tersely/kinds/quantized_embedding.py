"""A table of embeddings as small integers, and an output head that reads the same table.

    e(t) = m · W'[t]        y = x W'ᵀ + b

`table` is a child of the kind `quantized`: its codes, scales and zero points are packed row by row, so that a look-up
unpacks the rows of the tokens that came and no others.  The multiplier m is that of models that scale what they look up
(Gemma 3); where the model itself multiplies, or nobody does, there is none.  Rows leave in the dtype of the model, and
are multiplied in it, as the stock module does.  The row of a padding token is looked up like any other: in a stock
table only its gradient is special, and codes have none.

Tied models make their logits from the table of embeddings.  Then the table has one owner, the embedding, which stores
it once and counts it once; the head refers to it and holds nothing but its bias.  Both bear the name of the table (the
embedding's path when it was made), and `link_tables` finds by that name who belongs together, wherever a model class
has put the modules.  It also takes the head's weight off the list of tied parameters that the library keeps: what the
two would share are the guards against stock readers, which both must have (see `kinds.base`).  A bias that the model
keeps under a second name stays tied.  Whenever the library ties, it trims the bias of a head to the rows of its weight,
and asks an embedding for the rows of its own; these guards therefore have as many rows as the table, and no column.
"""

from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tersely.errors import CheckpointError
from tersely.kinds.base import Kind, LinearKind, Spec, dense_weight
from tersely.kinds.quantized import QuantizedLinear


class QuantizedEmbedding(Kind):
    """e(t) = m · W'[t] for a quantized W' of shape ``[num_embeddings, embedding_dim]``."""

    name = "quantized_embedding"

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group: str,
        *,
        padding: int | None = None,
        multiplier: float | None = None,
    ) -> None:
        """`group`: the name of the table, by which a tied head finds it."""
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding
        self.multiplier = multiplier
        self.group = group
        self.register_buffer("weight", torch.empty(num_embeddings, 0))
        self.table: nn.Module = nn.Linear(embedding_dim, num_embeddings, bias=False)

    @classmethod
    def of(
        cls, table: QuantizedLinear, group: str, *, padding: int | None = None, multiplier: float | None = None
    ) -> Self:
        """The embedding whose rows are those of a quantized weight."""
        with torch.device("meta"):
            module = cls(table.out_features, table.in_features, group, padding=padding, multiplier=multiplier)
        module.weight = table.weight.new_empty(table.out_features, 0)
        module.table = table
        return module

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        rows = self.rows_of().rows(tokens).to(self.weight.dtype)
        if self.multiplier is None:
            return rows
        return rows * torch.tensor(self.multiplier, device=rows.device).to(rows.dtype)

    def rows_of(self) -> QuantizedLinear:
        """The table.  Raises CheckpointError where a manifest has lost its description."""
        if not isinstance(self.table, QuantizedLinear):
            raise CheckpointError(f"the table {self.group} is a {type(self.table).__name__}; wanted a quantized one")
        return self.table

    def to_dense(self) -> Float[Tensor, "rows width"]:
        """The table that this module stands for, not multiplied, in float32."""
        return dense_weight(self.table)

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "group": self.group,
            "padding": self.padding_idx,
            "multiplier": self.multiplier,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(
            spec["num_embeddings"],
            spec["embedding_dim"],
            spec["group"],
            padding=spec["padding"],
            multiplier=spec["multiplier"],
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


class TiedHead(LinearKind):
    """y = x W'ᵀ + b, where W' is the table of an embedding elsewhere in the model."""

    name = "tied_head"

    def __init__(self, in_features: int, out_features: int, group: str, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.group = group
        self.register_buffer("weight", torch.empty(out_features, 0))
        self._owner: tuple[QuantizedEmbedding, ...] = ()  # in a tuple, where it is neither a child nor a parameter
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def of(cls, owner: QuantizedEmbedding) -> Self:
        """The head of an embedding, without a bias yet."""
        with torch.device("meta"):
            module = cls(owner.embedding_dim, owner.num_embeddings, owner.group)
        module.weight = owner.weight.clone()
        module._owner = (owner,)
        return module

    @property
    def holder(self) -> QuantizedEmbedding:
        """Whose child the table is.  Raises CheckpointError for a head that has not been linked."""
        if not self._owner:
            raise CheckpointError(f"the table {self.group} of the head is missing; link the model that has it")
        return self._owner[0]

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.bias = nn.Parameter(bias.detach().to(self.weight, copy=True))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        made: Tensor = self.holder.rows_of()(x)
        return made if self.bias is None else made + self.bias

    def to_dense(self) -> Float[Tensor, "out in"]:
        return self.holder.to_dense()

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "group": self.group,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(spec["in_features"], spec["out_features"], spec["group"], bias=spec["bias"])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, of {self.group}"


def link_tables(model: nn.Module) -> None:
    """Tell all tied heads in a model whose table they read.  Raises CheckpointError for a head without a table, and for
    one of another shape."""
    owners = {module.group: module for module in model.modules() if isinstance(module, QuantizedEmbedding)}
    ties = getattr(model, "all_tied_weights_keys", {})
    for name, module in model.named_modules():
        if not isinstance(module, TiedHead):
            continue
        owner = owners.get(module.group)
        if owner is None:
            raise CheckpointError(f"{name}: the table {module.group} of the head is missing from the model")
        if (owner.num_embeddings, owner.embedding_dim) != (module.out_features, module.in_features):
            raise CheckpointError(
                f"{name}: a head of shape {(module.out_features, module.in_features)}; its table {module.group} has "
                f"shape {(owner.num_embeddings, owner.embedding_dim)}"
            )
        module._owner = (owner,)
        ties.pop(f"{name}.weight", None)
