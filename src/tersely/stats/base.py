"""What calibration measures: streaming, mergeable accumulators.

Most look at an input, which belongs to no layer: q, k and v read the same tensor and share one Gram matrix.  Others
look at gradients of the loss, which every linear has for itself: in its output, or in its weight.  All of them add up
rows and do not know which; `keyed_by` says what they must be shown.
"""

from collections.abc import Mapping
from typing import Literal, Protocol, Self, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor


class Statistic(Protocol):
    """An accumulator.  Construction takes the width of the rows and the device to accumulate on."""

    tokens: int
    """Rows seen."""

    def __init__(self, width: int, device: str = "cpu") -> None: ...

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        """Add the rows of `x`."""

    def merge(self, other: Self) -> None:
        """Add what `other` has seen; the result is the same in any order, up to rounding."""

    def mean(self) -> Tensor:
        """The statistic per token (a maximum: over all tokens), float64.  Zero before the first token."""

    def state(self) -> dict[str, Tensor]:
        """Plain tensors from which `restore` rebuilds the accumulator exactly."""

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self: ...


@runtime_checkable
class PairedStatistic(Protocol):
    """A statistic that also looks at what the dense model reads in the same place."""

    def update_pair(self, x: Float[Tensor, "tokens width"], dense: Float[Tensor, "tokens width"]) -> None: ...


@runtime_checkable
class DriftStatistic(Protocol):
    """A statistic of what stands beside an input: how far the residual stream has drifted."""

    def update_drift(self, x: Float[Tensor, "tokens width"], drift: Float[Tensor, "tokens stream"]) -> None: ...


Keyed = Literal["input", "output", "weight", "flat"]
"""What the rows of a statistic are: tokens of an input, found under `Site.reads`; gradients of the loss in the output
of a linear, token by token; the rows of the gradient in its weight, one window after the other; that gradient as one
row, window by window.  All but the first are found under the name of the linear."""


def keyed_by(kind: type[Statistic]) -> Keyed:
    """As the class attribute `keyed` says, which statistics of gradients have; all others are of inputs."""
    keyed: Keyed = getattr(kind, "keyed", "input")
    return keyed


def of_shift(kind: type[Statistic]) -> bool:
    """As the class attribute `of_shift` says: whether there is nothing to gather as long as all is dense."""
    found: bool = getattr(kind, "of_shift", False)
    return found


S = TypeVar("S", bound=Statistic)
_OF = {"input": "input", "output": "linear", "weight": "linear", "flat": "linear"}


class Stats:
    """The statistics of one input, and perhaps of one linear, addressed by their type: ``stats[Gram].mean()``."""

    def __init__(self, accumulators: Mapping[type[Statistic], Statistic] | None = None) -> None:
        self._of = dict(accumulators or {})

    def __getitem__(self, kind: type[S]) -> S:
        if kind not in self._of:
            held = ", ".join(sorted(k.__name__ for k in self._of)) or "nothing"
            raise KeyError(
                f"no {kind.__name__} was gathered for this {_OF[keyed_by(kind)]} (gathered: {held}); add it to `needs`"
            )
        return self._of[kind]  # type: ignore[return-value]

    def __contains__(self, kind: type[Statistic]) -> bool:
        return kind in self._of

    def kinds(self) -> tuple[type[Statistic], ...]:
        return tuple(self._of)

    def update(
        self,
        x: Float[Tensor, "*windows tokens width"],
        dense: Float[Tensor, "*rows width"] | None = None,
        drift: Float[Tensor, "*rows stream"] | None = None,
    ) -> None:
        """Add the rows of `x`, window by window where a statistic says that it counts windows.  `dense`: what the dense
        model reads in their place, for statistics that compare the two; `drift`: how far its residual stream is from
        the one that what reads `x` writes to.  Without them nothing has been shifted."""
        rows, windows = x.reshape(-1, x.shape[-1]), x[None] if x.ndim == 2 else x.flatten(0, -3)
        for accumulator in self._of.values():
            if getattr(accumulator, "by_window", False):
                for window in windows:
                    accumulator.update(window)
            elif dense is not None and isinstance(accumulator, PairedStatistic):
                accumulator.update_pair(rows, dense.reshape(-1, dense.shape[-1]))
            elif drift is not None and isinstance(accumulator, DriftStatistic):
                accumulator.update_drift(rows, drift.reshape(-1, drift.shape[-1]))
            else:
                accumulator.update(rows)

    @property
    def divisible(self) -> bool:
        """Whether parts of the rows may be shown to copies, and these merged: nothing has been seen yet, and windows do
        not count as such."""
        return self.tokens == 0 and not any(getattr(a, "by_window", False) for a in self._of.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for a in self._of.values() for tensor in a.state().values())

    def merge(self, other: "Stats") -> None:
        """Add what `other` has seen, statistics of the same kinds."""
        for kind, accumulator in self._of.items():
            accumulator.merge(other[kind])

    def __or__(self, other: "Stats") -> "Stats":
        """What either holds, the very same accumulators."""
        return Stats(self._of | other._of)

    @property
    def tokens(self) -> int:
        return max((a.tokens for a in self._of.values()), default=0)
