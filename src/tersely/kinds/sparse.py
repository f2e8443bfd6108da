"""A weight with few entries that are not zero, row by row.

    y[i] = Σ_e value[e] · x[column[e]],   e over the entries of row i

It seldom stands alone: beside a term of small integers (kind `sum`) it holds the outliers, the few weights that are
worth 16 bits each, as what the integers lack of them.

Entries lie by rising rows and, within a row, by rising columns, so that one set of entries has one form.  Of a row it
is stored how many there are; where they begin is the sum over the rows before.  Values are the bits of float16 in
integers, times one power of two, `exponent`, as scales are (`linalg.grid`): no cast of the model rounds them again, an
outlier of a weight in 16 bits is that weight to the last digit (11 binary digits hold those of both formats; beyond
2^-29 of the largest entry a number loses digits, below 2^-39 it is gone), and a value takes two bytes whatever the
dtype of the model.  That is also why they are no parameters: an outlier is there to be exact, and a copy that trains
would be of 4 bytes in a model of float32.  Gradients pass to the input.

Bytes, of n entries in a weight of (out, in):  2 n  for values;  n, 2 n or 4 n  for columns, up to 2^8, 2^16 or more of
them;  out, 2 out or 4 out  for counts, by the most that a row could hold, min(n, in), below 2^8, 2^16 or more.  They
follow from the shape and n alone.

The product gathers the rows of xᵀ that entries name and adds them up row by row, as bags of embeddings are added: of
what torch offers on the processor this was the fastest for many tokens.  It is computed in float32 at least.
"""

from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tersely.errors import CheckpointError, NumericalError
from tersely.kinds.base import LinearKind, Spec
from tersely.linalg.grid import LOWEST_EXPONENT, TOP
from tersely.linalg.packing import index_dtype, narrowed, widened


class SparseLinear(LinearKind):
    """A few values in their places, zero everywhere else."""

    name = "sparse"

    values: Tensor
    columns: Tensor
    counts: Tensor

    def __init__(
        self, in_features: int, out_features: int, entries: int, *, exponent: int = 0, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features)
        self.entries = entries
        self.exponent = exponent
        of_columns, of_counts = _dtypes((out_features, in_features), entries)
        self.register_buffer("values", torch.empty(entries, dtype=torch.int16))
        self.register_buffer("columns", torch.empty(entries, dtype=of_columns))
        self.register_buffer("counts", torch.empty(out_features, dtype=of_counts))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], places: Bool[Tensor, "out in"], dtype: torch.dtype) -> Self:
        """The entries of `weight` at `places`, zeros among them too; `dtype` is that of the weight it replaces, for a
        bias.  Raises NumericalError for a value that is not finite in float32."""
        rows, columns = places.nonzero(as_tuple=True)  # row by row, columns rising
        wanted = weight.detach()[rows, columns].to(torch.promote_types(weight.dtype, torch.float32))
        if not torch.isfinite(wanted.float()).all():
            raise NumericalError("the weight has entries that are not finite; repair the checkpoint first")
        largest = wanted.abs().max() if len(wanted) else wanted.new_zeros(())
        exponent = max(int(torch.frexp(largest).exponent) - TOP, LOWEST_EXPONENT) if largest > 0 else 0
        out_features, in_features = weight.shape
        with torch.device("meta"):
            module = cls(in_features, out_features, len(columns), exponent=exponent)
        module.weight = torch.empty(0, dtype=dtype, device=weight.device)
        module.values = (wanted * 2.0**-exponent).to(torch.float16).view(torch.int16)
        module.columns = narrowed(columns, in_features - 1)
        module.counts = narrowed(torch.bincount(rows, minlength=out_features), min(len(columns), in_features))
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.bias = nn.Parameter(bias.detach().to(self.weight, copy=True))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        wide = x.reshape(-1, self.in_features).to(torch.promote_types(x.dtype, torch.float32))
        if wide.numel() and self.entries:
            counts = widened(self.counts)
            y = functional.embedding_bag(
                widened(self.columns),
                wide.T.contiguous(),
                counts.cumsum(0) - counts,
                mode="sum",
                per_sample_weights=self._floats().to(wide.dtype),
            ).T
        else:
            y = wide.new_zeros(len(wide), self.out_features)
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> Float[Tensor, "out in"]:
        dense = torch.zeros(self.out_features, self.in_features, device=self.values.device)
        dense[self.rows(), widened(self.columns)] = self._floats()
        return dense

    def rows(self) -> Int[Tensor, " entries"]:
        """The row of every entry."""
        counts = widened(self.counts)
        return torch.arange(self.out_features, device=counts.device).repeat_interleave(counts)

    def _floats(self) -> Float[Tensor, " entries"]:
        return self.values.view(torch.float16).float() * 2.0**self.exponent

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "entries": self.entries,
            "exponent": self.exponent,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        entries, shape = spec["entries"], (spec["out_features"], spec["in_features"])
        if not 0 <= entries <= shape[0] * shape[1]:
            raise CheckpointError(f"{entries} entries in a weight of {shape[0]} x {shape[1]}")
        return cls(shape[1], shape[0], entries, exponent=spec["exponent"], bias=spec["bias"])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, entries={self.entries}"


def sparse_bytes(shape: tuple[int, int], entries: int) -> int:
    """Bytes of so many entries of a weight of `shape` (out, in) as this kind."""
    of_columns, of_counts = _dtypes(shape, entries)
    return entries * (2 + of_columns.itemsize) + shape[0] * of_counts.itemsize


def _dtypes(shape: tuple[int, int], entries: int) -> tuple[torch.dtype, torch.dtype]:
    """How columns and counts are kept."""
    return index_dtype(shape[1] - 1), index_dtype(min(entries, shape[1]))
