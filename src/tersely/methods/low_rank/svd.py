"""Plain truncated SVD: the best rank r in the weight's own norm, blind to the data.

Minimises ‖W - W'‖² over W' of rank r; what is left is the sum of the squares of the dropped singular values.  On
trained language models this is known to ruin perplexity at 5 to 20 % removed: inputs are far from isotropic.  It is the
baseline of every other method, and the right tool for differences of weights.

Source: Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tersely.kinds import LinearKind
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.factorise import leaves_as_stored, low_rank, rank_options, rank_sizes
from tersely.option import Option
from tersely.stats import Statistic, Stats


@dataclass(frozen=True)
class PlainSVD:
    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = "Eckart and Young, 1936, The approximation of one matrix by another of lower rank"
    summary: ClassVar[str] = "truncated SVD of the weight, data-free"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        return rank_options(weight, output_basis(weight, vectors=False), self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        return low_rank(weight, None, amount, self.pivot)
