"""Who gets how many bytes.

An allocator sees one curve per site (what each amount costs and what error it leaves) and a budget in bytes; it returns
a plan.  Ranks, bits and channels compete on the one scale of bytes, and every curve ends with the option to leave the
site dense, so that no factorisation larger than what it replaces can ever be chosen.
"""

import heapq
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from tersely.errors import RecipeError
from tersely.option import Option

POINTS = 256
"""A curve with errors keeps this many options: steps of 0.4 % of a site's bytes are finer than any prediction."""


@dataclass(frozen=True)
class Curve:
    """What can be done to one site, by rising bytes; the last option leaves it dense at no error.

    `energy` is the error of removing the site altogether; errors of sites are compared relative to it.  None, as the
    errors of the options, where only bytes are known.
    """

    site: str
    dense_bytes: int
    energy: float | None
    options: tuple[Option, ...]

    def relative(self, option: Option) -> float | None:
        """Share of the site's output energy that an option loses, 0 to 1."""
        if option.error is None or self.energy is None:
            return None
        return option.error / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Choice:
    """What happens to one site.  amount None: left dense.  `relative_error` is predicted, 0 to 1; None if unknown."""

    amount: int | None
    nbytes: int
    dense_bytes: int
    relative_error: float | None


@dataclass(frozen=True)
class Plan:
    budget: int
    choices: dict[str, Choice]

    @property
    def nbytes(self) -> int:
        return sum(choice.nbytes for choice in self.choices.values())

    @property
    def dense_bytes(self) -> int:
        return sum(choice.dense_bytes for choice in self.choices.values())

    def to_json(self) -> str:
        sites = {site: asdict(choice) for site, choice in self.choices.items()}
        totals = {"budget": self.budget, "nbytes": self.nbytes, "dense_bytes": self.dense_bytes}
        return json.dumps(totals | {"sites": sites}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        plain = json.loads(text)
        return cls(plain["budget"], {site: Choice(**choice) for site, choice in plain["sites"].items()})


def curve_of(site: str, options: Iterable[Option], dense_bytes: int) -> Curve:
    """The curve of a site from a method's options: those that do not pay are dropped, "leave it dense" is added."""
    everything = list(options)
    energy = next((o.error for o in everything if o.amount == 0), None)
    useful = [o for o in everything if o.amount != 0 and o.nbytes < dense_bytes]
    if energy is not None and len(useful) > POINTS:
        step = (len(useful) - 1) / (POINTS - 1)
        useful = [useful[round(i * step)] for i in range(POINTS)]
    dense = Option(None, dense_bytes, None if energy is None else 0.0)
    return Curve(site, dense_bytes, energy, (*useful, dense))


def uniform(curves: Sequence[Curve], budget: int) -> Plan:
    """The same share for every site: its largest option within budget / dense bytes of its own dense size.

    A budget is a whole number of bytes, rounded down from a share that was asked for; every share below that of
    budget + 1 is therefore granted, and the sum stays within the budget all the same.
    """
    dense = sum(curve.dense_bytes for curve in curves)
    chosen = {}
    for curve in curves:
        within = [option for option in curve.options if option.nbytes * dense < (budget + 1) * curve.dense_bytes]
        if not within:
            least = max(curve.options[0].nbytes / curve.dense_bytes for curve in curves)
            raise RecipeError(_too_small(curve, f"a share of {budget * curve.dense_bytes // dense} bytes", least))
        chosen[curve.site] = _choice(curve, within[-1])
    return Plan(budget, chosen)


def greedy(curves: Sequence[Curve], budget: int) -> Plan:
    """Spend each byte where it avoids most of the error that can be avoided.

    The sum that falls is Σ dense bytes · error / (error of the smallest option).  A site counts by its size, as it does
    in the budget; without that factor a small site's loss would weigh as much as a large one's while costing fewer
    bytes to avoid.  And it counts by what its smallest form loses, not by its whole energy: of the outputs of q and k a
    first direction, much the same for every token, carries most energy and none of the message, and beside it every
    other error would look small (both measured in docs/lab.md).

    Starts from the smallest option everywhere and walks along the lower convex hulls of the curves, steepest segment
    first, until a segment does not fit; that one is taken as far as it goes.  On convex curves this is the optimum of
    the sum up to one segment, and more bytes never predict more error.
    """
    spent = sum(curve.options[0].nbytes for curve in curves)
    if spent > budget:
        worst = max(curves, key=lambda curve: curve.options[0].nbytes / curve.dense_bytes)
        came = f"a total budget of {budget} bytes where the smallest plan takes {spent}"
        raise RecipeError(_too_small(worst, came, spent / sum(curve.dense_bytes for curve in curves)))
    hulls = [_hull(curve) for curve in curves]
    reached = [0] * len(curves)
    queue = [
        (-_steepness(curve, hull, 0), i)
        for i, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        if len(hull) > 1
    ]
    heapq.heapify(queue)
    chosen = [curve.options[0] for curve in curves]
    while queue:
        _, i = heapq.heappop(queue)
        here, there = hulls[i][reached[i]], hulls[i][reached[i] + 1]
        if spent + there.nbytes - here.nbytes > budget:
            between = [o for o in curves[i].options if o.nbytes - here.nbytes <= budget - spent]
            chosen[i] = min(between, key=lambda o: (_error(o), o.nbytes))
            break
        spent += there.nbytes - here.nbytes
        reached[i] += 1
        chosen[i] = there
        if reached[i] + 1 < len(hulls[i]):
            heapq.heappush(queue, (-_steepness(curves[i], hulls[i], reached[i]), i))
    return Plan(budget, {curve.site: _choice(curve, option) for curve, option in zip(curves, chosen, strict=True)})


@dataclass(frozen=True)
class Allocator:
    divide: Callable[[Sequence[Curve], int], Plan]
    needs_errors: bool
    """Whether the curves must predict errors, which takes a sweep over the model; else their bytes are enough."""
    summary: str


ALLOCATORS: dict[str, Allocator] = {
    "greedy": Allocator(
        greedy, True, "bytes go where they avoid most of the predicted output error that can be avoided"
    ),
    "uniform": Allocator(uniform, False, "the same share of bytes for every site"),
}


def _choice(curve: Curve, option: Option) -> Choice:
    return Choice(option.amount, option.nbytes, curve.dense_bytes, curve.relative(option))


def _hull(curve: Curve) -> list[Option]:
    """Vertices of the lower convex hull of (bytes, error), by rising bytes and falling error."""
    hull: list[Option] = []
    for option in curve.options:
        if hull and _error(option) >= _error(hull[-1]):
            continue
        if hull and option.nbytes == hull[-1].nbytes:
            hull.pop()  # the same bytes for less error
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _error(option: Option) -> float:
    if option.error is None:
        raise ValueError("this allocator compares predicted errors, and the curve has none")
    return option.error


def _slope(first: Option, second: Option) -> float:
    return (_error(second) - _error(first)) / (second.nbytes - first.nbytes)


def _steepness(curve: Curve, hull: list[Option], vertex: int) -> float:
    """Share of the avoidable error that the segment behind a vertex avoids, for the share of the bytes it takes."""
    avoidable = _error(curve.options[0])
    return -_slope(hull[vertex], hull[vertex + 1]) * curve.dense_bytes / avoidable if avoidable else 0.0


def _too_small(curve: Curve, came: str, least: float) -> str:
    smallest = f"its smallest option takes {curve.options[0].nbytes} bytes"
    return f"{curve.site}: {came}; {smallest}: keep at least {math.ceil(least * 1000) / 1000}"
