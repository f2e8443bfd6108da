"""Dropping components so that the loss is predicted to stay where it is.

A method may predict of every option how much the loss will move, up or down (`Option.drift`).  All sites begin dense.
Each offers the next component that it would drop, the step to its next smaller option, and the steps of all sites
stand in two heaps by the sign of their δ, the least |δ| first.  While too many bytes are left,

    if the sum of δ so far is not above 0, take a step of the heap that raises the loss, else one that lowers it

(of the other heap where this one is empty), add its δ, and let the site offer its next one.  The sum so stays within
one |δ| of zero as long as both heaps last.  The order is the same for every budget, so more bytes never take anything
away from a site; the bytes that are counted are those of what is stored.

A factorisation takes fewer bytes than the dense weight only below its break-even rank.  The steps above it free
nothing, and a site that is still there when the budget is met is returned to dense; its δ then do not happen, and the
drift of the plan differs from zero by them.

No site falls below `FLOOR` of its bytes while another one can go on above it.  (The authors set that floor by hand,
where they remove 60 %; one rule for all budgets keeps the order the same.  Without any, sites whose gradients happen
to be small are emptied.)  Of equal |δ|, zeros above all, the site goes first that has lost the smallest share.

Departure: components of curves longer than `POINTS` are dropped some at a time.

Source: Abbasi et al., Zero Sum SVD: Balancing Loss Sensitivity for Low Rank LLM Compression, 2026 (arXiv 2602.02848).
"""

import heapq
from collections.abc import Sequence

from tersely.allocate.base import Curve, Plan, neediest, too_small
from tersely.errors import RecipeError
from tersely.option import Option

FLOOR = 0.3
"""Share of its bytes that a site keeps while others can give some; the paper's."""


def zero_sum(curves: Sequence[Curve], budget: int) -> Plan:
    """Drop components from all sites, rises and falls of the predicted loss in turn, until the budget is met.

    Raises RecipeError for curves without drifts, and for a budget below the smallest plan.
    """
    smallest = sum(curve.options[0].nbytes for curve in curves)
    if smallest > budget:
        came = f"a total budget of {budget} bytes where the smallest plan takes {smallest}"
        least = smallest / sum(curve.dense_bytes for curve in curves)
        raise RecipeError(too_small(neediest(curves), came, least))
    paths = [_path(curve) for curve in curves]
    drifts = [[_drift(curve, option) for option in path] for curve, path in zip(curves, paths, strict=True)]
    at = [0] * len(curves)
    heaps: tuple[list[tuple[float, float, int]], ...] = ([], [])  # those whose next step raises the loss, lowers it
    at_floor: list[int] = []

    def offer(site: int, floor: float) -> None:
        if at[site] + 1 == len(paths[site]):
            return
        following, dense = paths[site][at[site] + 1], curves[site].dense_bytes
        if following.nbytes < floor * dense:
            at_floor.append(site)
            return
        moved = drifts[site][at[site] + 1] - drifts[site][at[site]]
        heapq.heappush(heaps[moved < 0], (abs(moved), -paths[site][at[site]].nbytes / dense, site))

    floor = FLOOR
    for site in range(len(curves)):
        offer(site, floor)
    total, spent = 0.0, sum(curve.dense_bytes for curve in curves)
    while spent > budget:
        if not any(heaps):
            floor, waiting, at_floor = 0.0, at_floor, []
            for site in waiting:
                offer(site, floor)
        site = heapq.heappop(heaps[total > 0] or heaps[total <= 0])[-1]
        before, dense = min(paths[site][at[site]].nbytes, curves[site].dense_bytes), curves[site].dense_bytes
        total += drifts[site][at[site] + 1] - drifts[site][at[site]]
        at[site] += 1
        spent -= before - min(paths[site][at[site]].nbytes, dense)
        offer(site, floor)
    reached = [path[place] for path, place in zip(paths, at, strict=True)]
    chosen = [o if o.nbytes < c.dense_bytes else c.options[-1] for c, o in zip(curves, reached, strict=True)]
    return Plan.of(curves, chosen, budget)


def _path(curve: Curve) -> list[Option]:
    """From dense to the smallest option, through those that do not pay."""
    *useful, dense = curve.options
    return [dense, *reversed(curve.costly), *reversed(useful)]


def _drift(curve: Curve, option: Option) -> float:
    if option.drift is None:
        raise RecipeError(
            f"{curve.site}: the allocator zero_sum goes by the signed change of the loss that every option predicts, "
            "and this method predicts none; use zs_svd"
        )
    return option.drift
