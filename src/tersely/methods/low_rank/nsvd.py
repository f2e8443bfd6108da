"""Nested truncation: most of the rank in the metric of the inputs, the rest on the weight itself.

Whitening drops directions that calibration hardly excites, however large the weight is there; texts of another kind
excite them.  So of k ranks only k₁, a `share`, go by the metric G of the inputs, and k₂ = k - k₁ are spent on what is
left of the weight, in its own norm:

    W₁ = U₁ U₁ᵀ W,  U₁ the first k₁ eigenvectors of W G Wᵀ;      E = W - W₁ ≈ W₂ of rank k₂;      W' = W₁ + W₂.

For the second stage "svd" takes the best W₂ (Eckart and Young), "id" an interpolative decomposition: k₂ columns of E
chosen by pivoted QR, all others as their combinations.  Either way the columns of W₂ lie in a space Q₂ orthogonal to
U₁, and W₂ = Q₂ Q₂ᵀ E = Q₂ Q₂ᵀ W.  So the whole is a projection again, W' = Q Qᵀ W with Q = [U₁, Q₂], which tells the
error of every k₂ at once, since the projections of one k₁ are nested:

    tr(Δ G Δᵀ) = Σ_{i>k₁} λ_i - tr(Q₂ᵀ (W G Wᵀ) Q₂)   ≤   the error of W₁ alone.

A share of 1 is `svd_llm`, one of 0 is `svd`.  On the calibration text nesting can only lose against whitening of rank
k; in the weight's norm it can only gain.  The alternative with the same aim is more `damping` in `svd_llm`.

Departures: the paper names its variants I and II by the root of G, Cholesky or spectral; no root is taken here, and
both are the same W'.  The identity block of the interpolative form is not left out: `pivot` leaves out a larger one,
for either second stage.  Details that the abstract leaves open (how k is divided) are ours: k₁ is the nearest whole
number, and the second stage has a rank at least if the share is below 1.

Every k₁ has an eigenproblem of its own, where other truncations need one for all ranks.  So of a large weight only
some `ranks` are offered, each with its exact error: 1.2 s for each at width 1024 on one thread of an ordinary
processor, about as long as a whole curve of `svd_llm`.

Source: Lu et al., Large Language Model Compression via the Nested Activation-Aware Decomposition, 2025
(arXiv 2503.17101).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kinds import LinearKind
from tersely.linalg.truncation import OutputBasis, output_basis
from tersely.methods.low_rank.factorise import (
    check_damping,
    check_rank,
    damped_gram,
    factorised,
    largest_rank,
    leaves_as_stored,
    rank_sizes,
)
from tersely.option import Option
from tersely.stats import Gram, Statistic, Stats

FEW = 128  # of a weight with so many ranks all are offered: their eigenproblems take a second together


@dataclass(frozen=True)
class NSVD:
    share: float = 0.95
    """Of the rank that is chosen in the metric of the inputs, 0 to 1."""

    second: Literal["svd", "id"] = "svd"
    """How the rest approximates what is left: the best of its rank, or an interpolative decomposition of it."""

    damping: float = 1e-6
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    ranks: int = 32
    """How many ranks are offered of a weight that has more than 128, evenly up to the one that takes as many bytes as
    the weight.  Allocators that compare errors pay for each of them; for the uniform one a large number is free."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = (
        "Lu et al., 2025, Large Language Model Compression via the Nested Activation-Aware Decomposition "
        "(arXiv 2503.17101)"
    )
    summary: ClassVar[str] = "most ranks in the metric of the inputs, the rest on the residual of the weight"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise RecipeError(f"nsvd: share {self.share}; wanted 0 (plain SVD) to 1 (whitening)")
        if self.second not in ("svd", "id"):
            raise RecipeError(f"nsvd: second {self.second!r}; wanted 'svd' or 'id'")
        if self.ranks < 1:
            raise RecipeError(f"nsvd: ranks {self.ranks}; wanted 1 or more")
        check_damping("nsvd", self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot, self._offered(shape))

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact without damping; with it they are upper bounds, by at most damping · power · ‖W - W'‖².

        With two ranks or more in the second stage, a rank more is not guaranteed to lose less, as that stage begins
        anew behind another first one; allocators drop an option that loses more than a smaller one.
        """
        shape = (weight.shape[0], weight.shape[1])
        stage = output_basis(weight, damped_gram(stats, self.damping))
        errors = {0: stage.energy.sum().item()}
        for first, ranks in groupby(self._offered(shape), key=self._first):
            of_first = list(ranks)
            left = self._nested(stage, first, of_first[-1] - first).left_over().tolist()
            errors |= {rank: left[rank] for rank in of_first}
        sizes = rank_sizes(shape, weight.element_size(), self.pivot, self._offered(shape))
        return [replace(size, error=errors[size.amount]) for size in sizes]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        check_rank(weight, amount, self.pivot)
        stage = output_basis(weight, damped_gram(stats, self.damping))
        first = self._first(amount)
        return factorised(weight, self._nested(stage, first, amount - first), amount, self.pivot)

    def _offered(self, shape: tuple[int, int]) -> list[int]:
        """Rising.  All ranks if there are few, else evenly among those that make the weight smaller."""
        largest = largest_rank(shape, self.pivot)
        if largest <= max(FEW, self.ranks):
            return list(range(1, largest + 1))
        if not self.pivot:
            largest = (shape[0] * shape[1] - 1) // sum(shape)
        count = min(self.ranks, largest)
        return [-(-largest * place // count) for place in range(1, count + 1)]

    def _first(self, rank: int) -> int:
        """k₁ of k."""
        return rank if self.share == 1 else min(round(self.share * rank), rank - 1)

    def _nested(self, stage: OutputBasis, first: int, second: int) -> OutputBasis:
        """A basis whose first `first` vectors are those of stage one, and the next `second` those of stage two.

        Its energies are those in the metric of the inputs; they do not fall where the second stage begins.
        """
        if second == 0:
            return stage
        assert stage.vectors is not None  # asked for by both callers
        whitened, others = stage.vectors[:, :first], stage.vectors[:, first:]
        residual = others.T @ stage.core
        within = _leading(residual) if self.second == "svd" else _interpolating(residual, second)
        energy = torch.cat([stage.energy[:first], stage.energy[first:] @ within.square()])
        return replace(stage, energy=energy, vectors=torch.cat([whitened, others @ within], 1))


def _leading(residual: Float[Tensor, "rows in"]) -> Float[Tensor, "rows rows"]:
    """Left singular vectors, the largest first."""
    vectors: Tensor = torch.linalg.eigh(residual @ residual.T).eigenvectors
    return vectors.flip(1)


def _interpolating(residual: Float[Tensor, "rows in"], count: int) -> Float[Tensor, "rows rows"]:
    """An orthonormal basis whose first vectors span the columns that QR with column pivots chooses first."""
    left, chosen = residual.clone(), []
    for _ in range(count):
        power = left.square().sum(0)
        column = int(power.argmax())
        if power[column] == 0:  # the columns so far already are a basis of all
            break
        chosen.append(column)
        direction = left[:, column] / power[column].sqrt()
        left -= direction[:, None] * (direction @ left)
    basis: Tensor = torch.linalg.qr(residual[:, chosen], mode="complete").Q
    return basis
