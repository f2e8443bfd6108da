"""The contract of a cache method: another attention, that stores less of every token it has seen.

It has the two functions of every method, what could be done and do it, and two things of its own.  Bytes are those that
one token takes in the cache of the unit, keys and values together; weights may grow meanwhile.  And the result is not a
linear but the whole attention, as of a conversion: it takes the settings of the stock one, and the gains of the norms
of heads along with the weights.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from tersely.anatomy import Unit
from tersely.kinds import Kind
from tersely.kinds.attention import AttentionSettings
from tersely.option import Amount, Option
from tersely.stats import Statistic, Stats


class CacheMethod(Protocol):
    """Tensors and statistics are addressed by the last word of a role (q, k, v, o); `weights` given to `compress` also
    holds the gains q_norm and k_norm, where there are any."""

    paper: ClassVar[str]
    """Authors, year, title, identifier."""

    summary: ClassVar[str]
    """One line for listings."""

    roles: ClassVar[tuple[str, ...]]
    """The units that it treats."""

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics of the input of k and v that `options` and `compress` read."""

    def check(self, unit: Unit) -> None:
        """Raises AnatomyError with the reason where this unit cannot be treated."""

    def sizes(self, unit: Unit, itemsize: int) -> Sequence[Option]:
        """What could be done, by rising bytes per token, without errors."""

    def options(self, unit: Unit, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Sequence[Option]:
        """What could be done, by rising bytes per token, the first with amount 0 and the whole energy of keys and
        values as its error."""

    def compress(
        self,
        unit: Unit,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        stats: Mapping[str, Stats],
        amount: Amount,
        attention: AttentionSettings,
    ) -> dict[str, Kind]:
        """Do it: the new attention, with all its parts, under the key "" which stands for `unit.module` itself."""


def dense_bytes_per_token(unit: Unit, itemsize: int) -> int:
    """What a token takes in the cache of the stock attention."""
    return (unit.sites["k"].out_features + unit.sites["v"].out_features) * itemsize
