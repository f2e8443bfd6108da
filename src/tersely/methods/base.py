"""The contracts of methods.

A method is a frozen dataclass of hyperparameters with two pure functions: `options` says what it could do and at what
price, `compress` does one of these.  A `Method` sees one weight and the statistics of its input; a `UnitMethod` sees
the weights of linears that can only change together.  Neither ever sees a model; they mutate nothing, move nothing,
print nothing and draw no global random numbers.

A unit method may ask for more than a stock attention can run: heads of another width, or pairs of positions left out.
It then is a `RebuildsAttention` as well, and is told what that attention does before it is asked anything about it.
One that treats other sets of linears than attention and MLP `FormsUnits` itself.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tersely.anatomy import Site, Unit
from tersely.kinds import Kind, LinearKind
from tersely.kinds.attention import AttentionSettings
from tersely.option import Amount, Option
from tersely.stats import Statistic, Stats


class Method(Protocol):
    paper: ClassVar[str]
    """Authors, year, title, identifier."""

    summary: ClassVar[str]
    """One line for listings."""

    leaves: ClassVar[tuple[str, ...]]
    """Children of the result that are linears again, for later steps; empty where nothing is left to compress."""

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics of the input that `options` and `compress` read; empty for a data-free method."""

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        """What could be done, from the shape of a weight and the bytes of an element alone: options without errors."""

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """What could be done, by rising bytes.  The first has amount 0 and the whole energy as its error: it is never
        chosen, it says how much there is to lose."""

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> LinearKind:
        """Do it.  The result has the weight's dtype and device and no bias; the runner attaches that."""


class UnitMethod(Protocol):
    """Weights, biases and statistics are addressed by the last word of a role (q, k, v, o, gate, up, down, …).

    Statistics are those of the input that the linear reads.  Bytes are those of the weights of the whole unit.
    """

    paper: ClassVar[str]
    summary: ClassVar[str]

    roles: ClassVar[tuple[str, ...]]
    """The units that it treats: attention, mlp; reads, depth of those that form their own."""

    @property
    def needs(self) -> tuple[type[Statistic], ...]: ...

    def check(self, unit: Unit) -> None:
        """Raises AnatomyError with the reason where this unit cannot be treated."""

    def sizes(self, unit: Unit, itemsize: int) -> Sequence[Option]: ...

    def options(self, unit: Unit, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Sequence[Option]:
        """What could be done, by rising bytes, the first with amount 0 and all of the unit's output energy."""

    def compress(
        self,
        unit: Unit,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        stats: Mapping[str, Stats],
        amount: Amount,
    ) -> dict[str, Kind]:
        """Do it: the linears that changed, with their biases.  One that `RebuildsAttention` finds the gains q_norm and
        k_norm among the weights, where there are any, and returns the whole attention under the key "", which stands
        for `unit.module`."""


@runtime_checkable
class RebuildsAttention(Protocol):
    """What a unit method is besides, if it puts an attention of ours in the place of a stock one."""

    def for_attention(self, attention: AttentionSettings) -> UnitMethod:
        """The method for attention that does this; it is never asked about an attention without it."""


@runtime_checkable
class FormsUnits(UnitMethod, Protocol):
    """A unit method that says itself which of the chosen linears it treats together.  Each of them becomes a linear
    kind of the same shape."""

    leaves: ClassVar[tuple[str, ...]]
    """As of a `Method`."""

    def units(self, sites: Sequence[Site]) -> Sequence[Unit]:
        """All of the sites that it can treat, each in one unit, in order of execution."""
