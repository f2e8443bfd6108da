"""Two precisions: what spikes stays as it is, all else takes its smallest form.

The spike of a site is the largest number that it reads over the one that its tokens usually reach, or the same of the
rows of its weight, whichever is larger (`stats.peaks`).  Where all numbers of a tensor share one scale, a site with a
high spike is ruined by any form of few bits, and in models like Llama these are two or three of hundreds.  So the sites
are left dense in the order of falling spikes, for as long as the budget allows, and the budget says how many these are.

Meant for steps whose method has one form for each site (`spike_aware` or `rtn` with a width): of several the smallest
is taken.  Where nobody measured spikes, before a run, sites stand in their own order.

Source: Maisonnave et al., Precision Where It Matters: A Novel Spike Aware Mixed-Precision Quantization Strategy for
LLaMA-based Language Models, 2025 (arXiv 2504.21553).
"""

from collections.abc import Sequence

from tersely.allocate.base import Curve, Plan, neediest, too_small
from tersely.allocate.measures import Measures
from tersely.errors import RecipeError


def spikes(curves: Sequence[Curve], budget: int, measures: Measures) -> Plan:
    """Dense from the highest spike down, until one does not fit; the smallest option for all others."""
    chosen = [curve.options[0] for curve in curves]
    spent = sum(option.nbytes for option in chosen)
    if spent > budget:
        came = f"a total budget of {budget} bytes where the smallest plan takes {spent}"
        raise RecipeError(too_small(neediest(curves), came, spent / sum(curve.dense_bytes for curve in curves)))
    for site in sorted(range(len(curves)), key=lambda site: -measures.spikes.get(curves[site].site, 0.0)):
        dense = curves[site].options[-1]
        spent += dense.nbytes - chosen[site].nbytes
        if spent > budget:
            break
        chosen[site] = dense
    return Plan.of(curves, chosen, budget)
