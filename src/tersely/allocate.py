"""Who gets how many bytes.

An allocator sees one curve per site (what each amount costs and what error it leaves) and a budget in bytes; it returns
a plan.  Ranks, bits and channels compete on the one scale of bytes, and every curve ends with the option to leave the
site dense, so that no factorisation larger than what it replaces can ever be chosen.

Dividing a budget is the multiple-choice knapsack problem: one option for each site, the least sum of losses whose bytes
fit.  `greedy` walks its continuous relaxation and stops at the first step that does not fit; `knapsack` solves it, by
bounds and dominance over the few options that a better plan could contain.  (A general solver of mixed integer programs
takes minutes where this takes a second: all the plans near the best one look alike to it.)

Source: Pisinger, A minimal algorithm for the multiple-choice knapsack problem, European Journal of Operational Research
83, 1995.
"""

import heapq
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy

from tersely.errors import NumericalError, RecipeError
from tersely.option import Amount, Option

POINTS = 256
"""A curve with errors keeps this many options: steps of 0.4 % of a site's bytes are finer than any prediction."""

STATES = 10_000_000
"""Partial plans that the exact division looks at in one step: 0.5 GB of working memory.  Hundreds of sites with
hundreds of options take some ten thousand."""


@dataclass(frozen=True)
class Curve:
    """What can be done to one site, by rising bytes; the last option leaves it dense at no error.

    The options may be those of several methods; where errors are known, none is larger and worse than another.
    `energy` is the error of removing the site altogether, None where nobody measured it; errors are reported relative
    to it.  The errors of the options are None where only bytes are known.
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

    amount: Amount
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
    if any(o.error is None for o in everything):
        return Curve(site, dense_bytes, energy, (*useful, Option(None, dense_bytes, None)))
    useful = _undominated(useful)
    if len(useful) > POINTS:
        step = (len(useful) - 1) / (POINTS - 1)
        useful = [useful[round(i * step)] for i in range(POINTS)]
    return Curve(site, dense_bytes, energy, (*useful, Option(None, dense_bytes, 0.0)))


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
    options, _ = _walk(curves, budget)
    return Plan(budget, {curve.site: _choice(curve, option) for curve, option in zip(curves, options, strict=True)})


def knapsack(curves: Sequence[Curve], budget: int) -> Plan:
    """The least sum of all plans within the budget; the sum is that of `greedy`, which it never exceeds.

    With a price on bytes every site has a cheapest option, and Σ cheapest − price · budget is a bound that no plan can
    beat.  What a plan costs above the bound is Σ (cost − cheapest) + price · unspent bytes, all terms positive; so an
    option, or a combination of options, that costs more than the best plan found so far is in no better one.  The
    price is that of the segment at which `greedy` stops, which makes the bound the relaxed optimum.

    Beginning with the cheapest option everywhere, the sites are freed one after the other, those first whose second
    option costs least above their first; see `_freed`.

    Raises NumericalError where more than `STATES` partial plans would have to be told apart.
    """
    start, price = _walk(curves, budget)
    losses = [_loss(curve, option) for curve, option in zip(curves, start, strict=True)]
    offers = [_undominated(curve.options) for curve in curves]
    costs = [
        [_loss(curve, option) + price * option.nbytes for option in options]
        for curve, options in zip(curves, offers, strict=True)
    ]
    cheapest = [min(of_site) for of_site in costs]
    # of the plan of greedy above the bound, and the unit of all costs below
    distance = math.fsum([*losses, *(-cost for cost in cheapest), price * budget])
    rounding = 1e-14 * (math.fsum(cheapest) + price * budget)
    if price > 0 and distance > rounding:
        above = [
            [(option, (cost - least) / distance) for option, cost in zip(options, of_site, strict=True)]
            for options, of_site, least in zip(offers, costs, cheapest, strict=True)
        ]
        found = _freed(above, budget, price / distance)
        if found and math.fsum(_loss(c, o) for c, o in zip(curves, found, strict=True)) < math.fsum(losses):
            start = found
    return Plan(budget, {curve.site: _choice(curve, option) for curve, option in zip(curves, start, strict=True)})


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
    "knapsack": Allocator(
        knapsack, True, "the least predicted output error of all divisions, proven; as greedy counts it"
    ),
    "uniform": Allocator(uniform, False, "the same share of bytes for every site"),
}


def _choice(curve: Curve, option: Option) -> Choice:
    return Choice(option.amount, option.nbytes, curve.dense_bytes, curve.relative(option))


def _undominated(options: Iterable[Option]) -> list[Option]:
    """The options that no other one beats in bytes and error both: by rising bytes, with falling error."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, _error(option))):
        if not kept or _error(option) < _error(kept[-1]):
            kept.append(option)
    return kept


def _walk(curves: Sequence[Curve], budget: int) -> tuple[list[Option], float]:
    """The options that `greedy` chooses, and the loss per byte that it was refused at the end; 0 if nothing was."""
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
        falling, i = heapq.heappop(queue)
        here, there = hulls[i][reached[i]], hulls[i][reached[i] + 1]
        if spent + there.nbytes - here.nbytes > budget:
            between = [o for o in curves[i].options if o.nbytes - here.nbytes <= budget - spent]
            chosen[i] = min(between, key=lambda o: (_error(o), o.nbytes))
            return chosen, -falling
        spent += there.nbytes - here.nbytes
        reached[i] += 1
        chosen[i] = there
        if reached[i] + 1 < len(hulls[i]):
            heapq.heappush(queue, (-_steepness(curves[i], hulls[i], reached[i]), i))
    return chosen, 0.0


def _freed(offers: Sequence[Sequence[tuple[Option, float]]], budget: int, price: float) -> list[Option]:
    """The best plan of those that cost at most 1 above the bound; empty if rounding hides the last of them.

    `offers`: options with their costs above their site's cheapest; `price`: of an unspent byte, in the same unit.

    A partial plan is the bytes and the cost of the sites freed so far, the others being at their cheapest.  Of two
    partial plans the one with more bytes and more loss is dropped, and so is one that costs more than the best
    complete plan; every partial plan that fits is a complete one.  Where none of the sites left has a second option
    that is worth its cost, the best is proven.
    """
    chosen = [min(of_site, key=lambda offer: offer[1])[0] for of_site in offers]
    second = [sorted(cost for _, cost in of_site)[1] if len(of_site) > 1 else math.inf for of_site in offers]
    room = budget - sum(option.nbytes for option in chosen)
    nbytes, costs = numpy.zeros(1, dtype=numpy.int64), numpy.zeros(1)
    least, best = 1 + 1e-9, (0, 0) if room >= 0 else None
    freed: list[tuple[int, list[Option], numpy.ndarray]] = []
    for site in sorted(range(len(offers)), key=lambda site: second[site]):
        if second[site] > least:
            break
        worth = [(option, cost) for option, cost in offers[site] if cost <= least]
        if len(worth) * len(nbytes) > STATES:
            raise NumericalError(
                f"the best division cannot be told from {len(worth) * len(nbytes)} others of nearly equal loss; use "
                "the greedy allocator"
            )
        more = numpy.array([option.nbytes - chosen[site].nbytes for option, _ in worth])
        grown = (nbytes[:, None] + more).ravel(), (costs[:, None] + [cost for _, cost in worth]).ravel()
        origin = numpy.flatnonzero(grown[1] <= least)
        nbytes, costs = grown[0][origin], grown[1][origin]
        loss = costs - price * nbytes
        order = numpy.lexsort((loss, nbytes))
        lowest = numpy.minimum.accumulate(loss[order])
        order = order[numpy.append(True, lowest[1:] < lowest[:-1])]
        nbytes, costs = nbytes[order], costs[order]
        freed.append((site, [option for option, _ in worth], origin[order]))
        totals = numpy.where(nbytes <= room, costs + price * (room - nbytes), math.inf)
        if totals.min() < least:
            least, best = float(totals.min()), (len(freed), int(totals.argmin()))
    if best is None:
        return []
    steps, state = best
    for site, options, origin in reversed(freed[:steps]):
        state, at = divmod(int(origin[state]), len(options))
        chosen[site] = options[at]
    return chosen


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


def _loss(curve: Curve, option: Option) -> float:
    """What a site adds to the sum that falls: its bytes, times the share of the avoidable error that is left."""
    avoidable = _error(curve.options[0])
    return curve.dense_bytes * _error(option) / avoidable if avoidable else 0.0


def _slope(first: Option, second: Option) -> float:
    return (_error(second) - _error(first)) / (second.nbytes - first.nbytes)


def _steepness(curve: Curve, hull: list[Option], vertex: int) -> float:
    """Share of the avoidable error that the segment behind a vertex avoids, for the share of the bytes it takes."""
    avoidable = _error(curve.options[0])
    return -_slope(hull[vertex], hull[vertex + 1]) * curve.dense_bytes / avoidable if avoidable else 0.0


def _too_small(curve: Curve, came: str, least: float) -> str:
    smallest = f"its smallest option takes {curve.options[0].nbytes} bytes"
    return f"{curve.site}: {came}; {smallest}: keep at least {math.ceil(least * 1000) / 1000}"
