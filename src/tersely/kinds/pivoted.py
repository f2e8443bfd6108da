"""A weight of low rank whose other rows are combinations of r rows of its own.

The factors of  W' = up · down  may be mixed at will, W' = (up T)(T⁻¹ down), so r² of their numbers say nothing.  Choose
r rows J for which up[J] is invertible and take T = up[J]⁻¹: the new factor holds an identity in the rows J, which
nobody has to store, and `down` becomes those rows of W' themselves:

    W'[J] = down,      W'[others] = rest · down,      rest = up[others] up[J]⁻¹.

In exact arithmetic nothing is lost.  r (m + n) - r² numbers are stored for a weight of shape (m, n) in place of
r (m + n), fewer than m n at every rank below both sides, and a product takes as many multiplications less.

Which rows: rounding grows with the entries of `rest`, and a careless J makes them as large as 2^r.  Here none exceeds
`BOUND`.  Elimination with row pivots finds a first J; while an entry (i, j) is larger, row i takes the place of the
j-th chosen row, which multiplies |det up[J]| by that entry, so the exchange comes to an end.  The rows are chosen on an
orthonormal basis of the columns of `up`; factors that are not of full rank therefore need no special case.

`down` (in → r) and `rest` (r → out - r) are plain `nn.Linear`, so that a later step may quantize each of them.  `place`
says which number of [h, rest h] every output is; it is an integer of 16 bits (32 for more than 32767 outputs), counted
in the bytes.  The bias belongs to all outputs and sits beside them.

Source: Zhao et al., Pivoting Factorization: A Compact Meta Low-Rank Representation of Sparsity for Efficient Inference
in Large Language Models, 2025 (arXiv 2501.19090).
"""

from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tersely.errors import CheckpointError
from tersely.kinds.base import LinearKind, Spec, dense_weight

BOUND = 1.1
"""The largest magnitude in `rest`.  Trained weights of widths 128 and 384, at 0.7 of the rank at which factors are as
large as the weight, are off by 0.40 % once they are rounded to bfloat16: 0.39 % with a bound of 1, which takes more
exchanges, 0.49 % without a bound, 0.24 % as balanced factors."""


class PivotedLinear(LinearKind):
    """W'[J] = down, W'[others] = rest · down."""

    name = "pivoted"

    place: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        if not 1 <= rank < out_features:
            raise CheckpointError(
                f"a pivoted weight of rank {rank} with {out_features} rows; wanted rank 1 to {out_features - 1}, so "
                "that there are rows to choose and rows to combine"
            )
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.rest = nn.Linear(rank, out_features - rank, bias=False)
        self.register_buffer("place", torch.empty(out_features, dtype=place_dtype(out_features)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def from_factors(
        cls,
        up: Float[Tensor, "out rank"],
        down: Float[Tensor, "rank in"],
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The module that stands for up · down, computed in float64 and stored in `dtype` (default: the factors')."""
        dtype = dtype or up.dtype
        with torch.device("meta"):
            module = cls(down.shape[1], up.shape[0], up.shape[1])
        basis, mixing = torch.linalg.qr(up.detach().double())
        chosen, others = pivot_rows(basis)
        rest = torch.linalg.solve(basis[chosen], basis[others], left=False)
        rows = basis[chosen] @ (mixing @ down.detach().double())
        module.weight = torch.empty(0, dtype=dtype, device=up.device)
        module.down.weight = nn.Parameter(rows.to(dtype).contiguous())
        module.rest.weight = nn.Parameter(rest.to(dtype).contiguous())
        module.place = torch.cat([chosen, others]).argsort().to(place_dtype(len(up)))
        return module

    def set_bias(self, bias: Float[Tensor, " out"]) -> None:
        self.bias = nn.Parameter(bias.detach().to(self.weight, copy=True))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        chosen = self.down(x)
        y = torch.cat([chosen, self.rest(chosen)], -1).index_select(-1, self.place.int())
        return y if self.bias is None else y + self.bias

    def spec(self) -> Spec:
        return {
            "kind": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        return cls(spec["in_features"], spec["out_features"], spec["rank"], bias=spec["bias"])

    def to_dense(self) -> Float[Tensor, "out in"]:
        rows = dense_weight(self.down)
        return torch.cat([rows, dense_weight(self.rest) @ rows])[self.place.long()]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def place_dtype(out_features: int) -> torch.dtype:
    return torch.int16 if out_features <= torch.iinfo(torch.int16).max else torch.int32


def pivoted_bytes(shape: tuple[int, int], rank: int, itemsize: int) -> int:
    """Bytes of a weight of `shape` (out, in) as this kind."""
    return (rank * sum(shape) - rank**2) * itemsize + shape[0] * place_dtype(shape[0]).itemsize


def pivot_rows(basis: Float[Tensor, "out rank"]) -> tuple[Int[Tensor, " rank"], Int[Tensor, " others"]]:
    """The rows J to keep and the others, both rising: no entry of basis[others] basis[J]⁻¹ exceeds `BOUND`.

    The columns of `basis` are orthonormal.
    """
    rank = basis.shape[1]
    eliminated, swaps = torch.linalg.lu_factor(basis)
    order = list(range(len(basis)))
    for row, other in enumerate((swaps - 1).tolist()):
        order[row], order[other] = order[other], order[row]
    # with P basis = [L₁; L₂] R the coefficients are L₂ L₁⁻¹
    rest = torch.linalg.solve_triangular(
        eliminated[:rank], eliminated[rank:], upper=False, left=False, unitriangular=True
    )
    while True:
        row, column = divmod(int(rest.abs().argmax()), rank)
        pivot = rest[row, column].item()
        if abs(pivot) <= BOUND:
            break
        order[column], order[rank + row] = order[rank + row], order[column]
        leaving = -rest[row] / pivot
        leaving[column] = 1 / pivot
        arriving = rest[row].clone()
        arriving[column] -= 1
        rest.addr_(rest[:, column] / pivot, arriving, alpha=-1)
        rest[row] = leaving
    chosen, others = sorted(order[:rank]), sorted(order[rank:])
    return torch.tensor(chosen, device=basis.device), torch.tensor(others, device=basis.device)
