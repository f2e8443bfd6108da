"""The contract of a method.

A method is a frozen dataclass of hyperparameters with two pure functions: `options` says what it could do to a weight
and at what price, `compress` does one of these.  It sees a weight and the statistics of its input, never a model; it
mutates nothing, moves nothing, prints nothing and draws no global random numbers.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor

from tersely.kinds import LinearKind
from tersely.option import Option
from tersely.stats import Statistic, Stats


class Method(Protocol):
    paper: ClassVar[str]
    """Authors, year, title, identifier."""

    summary: ClassVar[str]
    """One line for listings."""

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics of the input that `options` and `compress` read; empty for a data-free method."""

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        """What could be done, from the shape of a weight and the bytes of an element alone: options without errors."""

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """What could be done, by rising bytes.  The first has amount 0 and the whole energy as its error: it is never
        chosen, it says how much there is to lose."""

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        """Do it.  The result has the weight's dtype and device and no bias; the runner attaches that."""
