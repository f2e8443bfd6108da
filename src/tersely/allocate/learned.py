"""Bytes that were learned, as options.

What a gradient finds is a real number of bytes for every site, on a surface of equal totals (see `gating`).  A site
takes its largest option within that; what rounding down leaves over goes, an option at a time, to the site that would
then lie least above what it learned, as long as something fits.  A plan is therefore below its budget by less than the
smallest step that any site still has.

`consensus`: two estimates of one thing, with errors of different kinds.  What `lems` measures is one site at a time,
and knows nothing of how losses add up; what is learned knows that, and the calibration text a little too well.  Halfway
between the two plans the errors of either count half.

Before anything is learned every site counts as having learned the same share of itself, and the first step that does
not fit is the last: budgets are compared then, and a larger one must not predict a larger error.  (What is learned is
learned for one budget.)

Source: Wang et al., Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives, 2025
(arXiv 2502.02723), for what is learned; they round ranks to integers.
"""

import heapq
from collections.abc import Sequence
from dataclasses import replace

from tersely.allocate.base import Curve, Plan, neediest, too_small
from tersely.allocate.measures import Measures
from tersely.allocate.optimum import lems
from tersely.errors import RecipeError


def learned(curves: Sequence[Curve], budget: int, measures: Measures) -> Plan:
    """The options nearest to what was learned, within the budget."""
    smallest, dense = (
        sum(sizes) for sizes in zip(*((c.options[0].nbytes, c.dense_bytes) for c in curves), strict=True)
    )
    if smallest > budget:
        came = f"a total budget of {budget} bytes where the smallest plan takes {smallest}"
        raise RecipeError(too_small(neediest(curves), came, smallest / dense))
    # a byte at least, so that what lies above it can be compared
    wanted = [max(measures.learned.get(c.site, c.dense_bytes * budget / dense), 1.0) for c in curves]
    places = [
        max(sum(option.nbytes <= most for option in curve.options) - 1, 0)
        for curve, most in zip(curves, wanted, strict=True)
    ]

    def level(site: int, place: int) -> float:
        return curves[site].options[place].nbytes / wanted[site]

    spent = sum(curve.options[place].nbytes for curve, place in zip(curves, places, strict=True))
    while spent > budget:  # where the smallest options of some sites are more than they learned
        site = max((i for i, place in enumerate(places) if place), key=lambda i: level(i, places[i]))
        places[site] -= 1
        spent -= curves[site].options[places[site] + 1].nbytes - curves[site].options[places[site]].nbytes
    above = [(level(i, place + 1), i) for i, place in enumerate(places) if place + 1 < len(curves[i].options)]
    heapq.heapify(above)
    while above:
        _, site = heapq.heappop(above)
        options, place = curves[site].options, places[site]
        step = options[place + 1].nbytes - options[place].nbytes
        if spent + step <= budget:
            places[site], spent = place + 1, spent + step
            if place + 2 < len(options):
                heapq.heappush(above, (level(site, place + 2), site))
        elif not measures.learned:
            break
    return Plan.of(curves, [curve.options[place] for curve, place in zip(curves, places, strict=True)], budget)


def consensus(curves: Sequence[Curve], budget: int, measures: Measures) -> Plan:
    """Every site halfway between the bytes that `lems` gives it and those that it learned."""
    plan = lems(curves, budget, measures)
    if not measures.learned:
        return plan
    halfway = {
        site: (choice.nbytes + measures.learned.get(site, choice.nbytes)) / 2 for site, choice in plan.choices.items()
    }
    return learned(curves, budget, replace(measures, learned=halfway))
