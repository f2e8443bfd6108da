"""Truncated SVD of a weight in the metric of its inputs.

Minimises E‖(W - W')x‖² over W' of rank r.  The paper whitens: with E[x xᵀ] = S Sᵀ it truncates the SVD of W S and maps
back by S⁻¹, and the error left is the sum of the squares of the dropped singular values.  The same W' is U_r U_rᵀ W
with U the eigenvectors of W E[x xᵀ] Wᵀ: no root, no inverse, nothing that a rank-deficient matrix could break (see
`linalg.truncation`).

Departures from the authors' code: theirs takes a Cholesky factor of the Gram matrix, adds an absolute constant where
that fails, and inverts it explicitly; ours does neither.  Their update of U on shifted inputs and their fine-tuning are
steps of their own.  `damping` mixes a little of the identity into the metric: directions that calibration never excited
would otherwise be dropped without any price.

Source: Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression, 2024,
section 3.1 (arXiv 2403.07378).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tersely.kinds import LinearKind
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.factorise import (
    check_damping,
    damped_gram,
    leaves_as_stored,
    low_rank,
    rank_options,
    rank_sizes,
)
from tersely.option import Option
from tersely.stats import Gram, Statistic, Stats


@dataclass(frozen=True)
class WhitenedSVD:
    damping: float = 1e-6
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = (
        "Wang et al., 2024, SVD-LLM: Truncation-aware Singular Value Decomposition (arXiv 2403.07378)"
    )
    summary: ClassVar[str] = "truncated SVD in the metric of the inputs (whitening)"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        check_damping("svd_llm", self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact without damping; with it they are upper bounds, by at most damping · power · ‖W - W'‖²."""
        return rank_options(weight, output_basis(weight, self._metric(stats), vectors=False), self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        return low_rank(weight, self._metric(stats), amount, self.pivot)

    def _metric(self, stats: Stats) -> Float[Tensor, "in in"]:
        return damped_gram(stats, self.damping)
