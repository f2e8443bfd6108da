"""Sensitivity-based truncation rank searching: what hurts least goes first.

For every site and every ratio, the model is measured with that one site cut to that ratio.  All (site, ratio, loss) are
put in one list, the most harmful first.  A plan is a suffix of it: every site takes the smallest ratio that occurs for
it there, and a site that does not occur is left dense.  The longer the suffix, the fewer bytes; the shortest one that
fits is found by bisection.

Departures: the smallest option of a site is measured beside the ratios 0.1 to 0.9, so that every budget that can be met
is met.  The paper's other target, a perplexity instead of a size, is a budget of every allocator (see `planning`).
Without measurements, the loss as `greedy` predicts it stands in; the authors' code has such a mode as well, with
another proxy.

Source: Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models, 2023,
section 3.3 (arXiv 2312.05821).
"""

from collections.abc import Sequence

from tersely.allocate.base import Curve, Plan, error_of, neediest, too_small
from tersely.allocate.measures import Measures
from tersely.allocate.optimum import avoidable
from tersely.errors import RecipeError
from tersely.option import Option

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sensitivity(curves: Sequence[Curve], budget: int, measures: Measures) -> Plan:
    """The shortest suffix of the sorted list that fits; see above."""
    smallest = sum(curve.options[0].nbytes for curve in curves)
    if smallest > budget:
        came = f"a total budget of {budget} bytes where the smallest plan takes {smallest}"
        least = smallest / sum(curve.dense_bytes for curve in curves)
        raise RecipeError(too_small(neediest(curves), came, least))
    listed = []
    for i, (curve, yard) in enumerate(zip(curves, avoidable(curves), strict=True)):
        for option in ratio_probes(curve):
            harm = measures.harm[curve.site][option.nbytes] if measures.harm else yard.loss(error_of(option))
            listed.append((-harm, option.nbytes, i, option))
    listed.sort(key=lambda entry: entry[:3])  # of equals the smallest first, as if it were the most harmful
    fits, too_many = 0, len(listed) + 1
    while too_many - fits > 1:
        start = (fits + too_many) // 2
        if sum(option.nbytes for option in _of_suffix(curves, listed[start:])) <= budget:
            fits = start
        else:
            too_many = start
    return Plan.of(curves, _of_suffix(curves, listed[fits:]), budget)


def ratio_probes(curve: Curve) -> list[Option]:
    """The smallest option, and the largest below each ratio; none where the site can only be left dense."""
    smaller = [option for option in curve.options if option.amount is not None]
    places = {0} | {sum(o.nbytes <= ratio * curve.dense_bytes for o in smaller) - 1 for ratio in RATIOS}
    return [smaller[place] for place in sorted(places) if 0 <= place < len(smaller)]


def _of_suffix(curves: Sequence[Curve], suffix: Sequence[tuple[float, int, int, Option]]) -> list[Option]:
    chosen = [curve.options[-1] for curve in curves]
    for _, nbytes, i, option in suffix:
        if nbytes < chosen[i].nbytes:
            chosen[i] = option
    return chosen
