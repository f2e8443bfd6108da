"""The least predicted loss within a budget.

Dividing a budget is the multiple-choice knapsack problem: one option for each site, the least sum of losses whose bytes
fit.  `greedy` walks its continuous relaxation and stops at the first step that does not fit; `knapsack` solves it, by
bounds and dominance over the few options that a better plan could contain.  (A general solver of mixed integer programs
takes minutes where this takes a second: all the plans near the best one look alike to it.)

Everything depends on how the errors of different sites compare: on what one unit of error counts (`Yard`).  `greedy`
and `knapsack` take it from the curve; `lems` has measured, site by site, what one known error does to the model:

    e(option) = KL · E(option) / E(probe)

with KL the divergence from the dense model when this site alone becomes the probe, its option nearest to a tenth of its
bytes, and E the errors of the curve.

Departures of `lems`: the paper multiplies by a factor that falls with depth and is searched by ten trials with the
whole model, which are not made here; it offers multiples of eight ranks between 0.3 and 0.95 of break-even (0.1 below
half), here every option is offered, below the probe too.

Source: Pisinger, A minimal algorithm for the multiple-choice knapsack problem, European Journal of Operational Research
83, 1995.
Source: Thoma et al., Advancing SVD-based LLM Compression via Layer-Wise Error Model Search, 2026 (ICML).
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy

from tersely.allocate.base import Curve, Plan, error_of, neediest, too_small, undominated
from tersely.allocate.measures import Measures
from tersely.errors import NumericalError, RecipeError
from tersely.option import Option

STATES = 10_000_000
"""Partial plans that the exact division looks at in one step: 0.5 GB of working memory.  Hundreds of sites with
hundreds of options take some ten thousand."""

PROBE = 0.1
"""Share of a site's bytes at which `lems` measures it."""


class Yard(NamedTuple):
    """What errors of a site count: `scale` for each `unit` of error."""

    scale: float
    unit: float

    def loss(self, error: float) -> float:
        return self.scale * error / self.unit if self.unit else 0.0


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
    options, _ = _walk(curves, budget, avoidable(curves))
    return Plan.of(curves, options, budget)


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
    return _knapsack(curves, budget, avoidable(curves))


def total(curves: Sequence[Curve], budget: int) -> Plan:
    """The least plain sum of the predicted errors, for methods whose errors are increases of the model's loss and so
    compare from site to site (those that read gradients).  Errors of outputs do not, and it ruins methods that predict
    these."""
    return _knapsack(curves, budget, [Yard(1.0, 1.0)] * len(curves))


def lems(curves: Sequence[Curve], budget: int, measures: Measures) -> Plan:
    """As `knapsack`, and a site counts by what the model was measured to lose through it."""
    if not measures.harm:
        return knapsack(curves, budget)
    yards = []
    for curve in curves:
        probed = lems_probe(curve)
        # rounding can make a divergence of nothing negative
        yards += [Yard(max(measures.harm[curve.site][o.nbytes], 0.0), error_of(o)) for o in probed]
        yards += [] if probed else [Yard(0.0, 0.0)]
    return _knapsack(curves, budget, yards)


def lems_probe(curve: Curve) -> list[Option]:
    """The option that comes nearest to a tenth of the site's bytes; none where it can only be left dense."""
    smaller = [option for option in curve.options if option.amount is not None]
    return [min(smaller, key=lambda o: abs(o.nbytes - PROBE * curve.dense_bytes))] if smaller else []


def avoidable(curves: Sequence[Curve]) -> list[Yard]:
    """A site counts its bytes, times the share left of the error that its smallest option makes."""
    return [Yard(curve.dense_bytes, error_of(curve.options[0])) for curve in curves]


def _knapsack(curves: Sequence[Curve], budget: int, yards: Sequence[Yard]) -> Plan:
    start, price = _walk(curves, budget, yards)
    losses = [yard.loss(error_of(option)) for yard, option in zip(yards, start, strict=True)]
    offers = [undominated(curve.options) for curve in curves]
    costs = [
        [yard.loss(error_of(option)) + price * option.nbytes for option in options]
        for yard, options in zip(yards, offers, strict=True)
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
        if found and math.fsum(y.loss(error_of(o)) for y, o in zip(yards, found, strict=True)) < math.fsum(losses):
            start = found
    return Plan.of(curves, start, budget)


def _walk(curves: Sequence[Curve], budget: int, yards: Sequence[Yard]) -> tuple[list[Option], float]:
    """The options that `greedy` chooses, and the loss per byte that it was refused at the end; 0 if nothing was."""
    spent = sum(curve.options[0].nbytes for curve in curves)
    if spent > budget:
        came = f"a total budget of {budget} bytes where the smallest plan takes {spent}"
        raise RecipeError(too_small(neediest(curves), came, spent / sum(curve.dense_bytes for curve in curves)))
    hulls = [_hull(curve) for curve in curves]
    reached = [0] * len(curves)
    queue = [
        (-_steepness(yard, hull, 0), i)
        for i, (yard, hull) in enumerate(zip(yards, hulls, strict=True))
        if len(hull) > 1
    ]
    heapq.heapify(queue)
    chosen = [curve.options[0] for curve in curves]
    while queue:
        falling, i = heapq.heappop(queue)
        here, there = hulls[i][reached[i]], hulls[i][reached[i] + 1]
        if spent + there.nbytes - here.nbytes > budget:
            between = [o for o in curves[i].options if o.nbytes - here.nbytes <= budget - spent]
            chosen[i] = min(between, key=lambda o: (error_of(o), o.nbytes))
            return chosen, -falling
        spent += there.nbytes - here.nbytes
        reached[i] += 1
        chosen[i] = there
        if reached[i] + 1 < len(hulls[i]):
            heapq.heappush(queue, (-_steepness(yards[i], hulls[i], reached[i]), i))
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
        if hull and error_of(option) >= error_of(hull[-1]):
            continue
        if hull and option.nbytes == hull[-1].nbytes:
            hull.pop()  # the same bytes for less error
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    return (error_of(second) - error_of(first)) / (second.nbytes - first.nbytes)


def _steepness(yard: Yard, hull: Sequence[Option], vertex: int) -> float:
    """What the segment behind a vertex takes away from the sum, for each of its bytes."""
    return -yard.loss(_slope(hull[vertex], hull[vertex + 1]))
