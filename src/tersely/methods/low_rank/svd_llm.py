"""Truncated SVD of a weight in the metric of its inputs.

Minimises E‖(W - W')x‖² over W' of rank r.  The paper whitens: with E[x xᵀ] = S Sᵀ it truncates the SVD of W S and maps
back by S⁻¹, and the error left is the sum of the squares of the dropped singular values.  The same W' is U_r U_rᵀ W
with U the eigenvectors of W E[x xᵀ] Wᵀ: no root, no inverse, nothing that a rank-deficient matrix could break (see
`linalg.truncation`).

Behind compressed blocks a linear reads x̂ in the place of x.  `update` keeps the rows B = U_rᵀ W that the dense inputs
chose and fits the other factor to the shifted ones,

    Û = argmin E‖W x̂ - Û B x̂‖² = W Ĝ Bᵀ (B Ĝ Bᵀ)⁺,   Ĝ = E[x̂ x̂ᵀ].

For Ĝ = G that is U_r again: B G Bᵀ = Λ_r and W G Bᵀ = U_r Λ_r.  With `propagate = "none"` the inputs are the dense ones
and the update changes nothing; with `block` and `input` the rows come from the dense inputs and the rest from those
that really arrive, while without the update both come from those that arrive.

Departures from the authors' code: theirs takes a Cholesky factor of the Gram matrix, adds an absolute constant where
that fails, and inverts it explicitly; ours does neither.  Theirs solves the update by least squares over the tokens;
ours from the second moments.  Their fine-tuning is two steps that train: the relaxation `adapter` with its `factors`.
`damping` mixes a little of the identity into the metric: directions that calibration never excited
would otherwise be dropped without any price.

Source: Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression, 2024,
sections 3.1 and 3.2 (arXiv 2403.07378).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind, RemappedLinear
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.factorise import (
    check_damping,
    check_rank,
    check_storage,
    damped_gram,
    factorised,
    leaves_as_stored,
    low_rank,
    rank_options,
    rank_sizes,
    remapped_options,
    remapped_sizes,
)
from tersely.option import Option
from tersely.stats import Cross, Gram, Statistic, Stats

MOST_POWER = 100
"""Power iterations beyond which the whole eigenproblem is cheaper and exact."""


@dataclass(frozen=True)
class WhitenedSVD:
    damping: float = 1e-6
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    remap: bool = False
    """Store the factors in 8 bits, what the longer one has more of in 16: every rank up to the full one is smaller than
    the weight in 16 bits (see `kinds.remapped`); not together with `pivot`."""

    update: bool = False
    """Take the rows of the product from the dense inputs and fit the other factor to those behind compressed blocks
    (closed form); without it both are fitted to the latter.  Nothing changes with propagate = "none"."""

    power: int | None = None
    """Truncate by a randomised projection with so many power iterations instead of the whole eigenproblem: faster at
    low ranks, a little above the least error, which the report measures (see `linalg.randomised`)."""

    paper: ClassVar[str] = (
        "Wang et al., 2024, SVD-LLM: Truncation-aware Singular Value Decomposition (arXiv 2403.07378)"
    )
    summary: ClassVar[str] = "truncated SVD in the metric of the inputs (whitening)"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        check_damping("svd_llm", self.damping)
        check_storage("svd_llm", self.pivot, self.remap)
        if self.power is not None and (not 1 <= self.power <= MOST_POWER or self.update):
            also = "; not together with update" if self.update else ""
            wanted = f"1 to {MOST_POWER} power iterations, or none"
            raise RecipeError(f"svd_llm: power {self.power}; wanted {wanted}{also}")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram, Cross) if self.update else (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return remapped_sizes(shape) if self.remap else rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact without damping; with it they are upper bounds, by at most damping · power · ‖W - W'‖²."""
        if self.remap:
            metric = self._metric(stats)
            return remapped_options(weight, output_basis(weight, metric), metric)
        return rank_options(weight, output_basis(weight, self._metric(stats), vectors=False), self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        if not self.update:
            return low_rank(weight, self._metric(stats), amount, self.pivot, self.remap, self.power)
        check_rank(weight, amount, self.pivot)
        up, down = output_basis(weight, self._metric(stats), rank=amount).factors(amount)
        product = refitted(weight, up, down, damped_gram(stats, self.damping))
        # the product has that rank: nothing is lost, whatever it is stored as
        basis = output_basis(product, rank=amount)
        if self.remap:
            return RemappedLinear.of(product, basis.factors(amount)[0], weight.dtype)
        return factorised(weight, basis, amount, self.pivot)

    def _metric(self, stats: Stats) -> Float[Tensor, "in in"]:
        """Of the inputs that choose the rows: with the update the dense ones."""
        return damped_gram(_of_dense(stats) if self.update else stats, self.damping)


def refitted(
    weight: Float[Tensor, "out in"],
    up: Float[Tensor, "out rank"],
    down: Float[Tensor, "rank in"],
    metric: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """The product of `down` and the factor that goes with it best under a metric, float64.

    Fitted is what `up` leaves over.  So the product stays as it is in directions that the metric does not know, and
    nothing is lost to rounding where `up` is the best already.  Raises NumericalError where the products overflow.
    """
    left = weight.double() - up @ down
    reached = down @ metric
    power = (reached * down).sum(1, keepdim=True).clamp(min=0).sqrt()
    scale = torch.where(power > 0, power, torch.ones_like(power))  # rows of equal power: the pseudo-inverse drops none
    rows, reached = down / scale, reached / scale
    inner = reached @ rows.T
    if not torch.isfinite(inner).all():
        raise NumericalError("svd_llm: the product of factor and input statistic overflows float64; a scale is wrong")
    return up @ down + (left @ reached.T) @ torch.linalg.pinv((inner + inner.T) / 2, hermitian=True) @ rows


def _of_dense(stats: Stats) -> Stats:
    """The Gram matrix of the dense inputs, which come along with the cross moments."""
    both = stats[Cross].state()
    return Stats({Gram: Gram.restore({"sum": both["dense"], "tokens": both["tokens"]})})
