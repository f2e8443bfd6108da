"""Divisions that give every site a share: of its own bytes, or by what one number says about it.

All of them raise one level, as water rises in vessels of different widths.  A site takes its largest option that lies
below the level, the level rises while the budget lasts, and whoever is dense already takes no more: what it would have
got goes to the others.  More bytes never take anything away from a site.

    uniform          every site the same share
    svd_llm_v2       within a role a site loses by 1 / log(1 + L), with L the output error at the uniform share
    effective_rank   a site's rank is the square root of (effective rank / bytes of a rank)
    importance       half of everyone's share is sure, half goes by how much a block changes what it is given
    block_influence  a site loses by exp(-s / ε), with s how much its block changes what it is given

`svd_llm_v2`: the paper's 1 / log L needs L > 1; with log(1 + L) nothing needs to be so, and where it is large, as it
is for a norm over all tokens, the two agree.  Errors are means over tokens and are multiplied by their number.  The
means of a role are exact, as in the paper, up to options that are not continuous.

`effective_rank`: minimises Σ R/k, with R the effective rank of a site and k the rank that it gets, at Σ ω k = budget;
setting the derivative of the Lagrangian to zero, k ∝ √(R/ω), which in bytes is √(R ω).  The paper shares bases among
layers, caps ranks at break-even without redistribution, and afterwards moves a tenth or more of the rank from queries
and keys to values; here every site stands alone and nothing is moved.

`importance`: the paper's retention is mrr + I (trr - mrr), with I an importance divided by its mean, so that the mean
retention is trr whatever mrr is.  mrr is chosen by hand for every target there, 0.4 to 0.5 for a trr of 0.4 to 0.6;
here it is half of trr.  The means are weighted with bytes.  The paper's importance is the cosine of x and W x, which
does not exist for a W that is not square.  Ours is 1 minus the cosine of what a block is given and what it returns, for
all sites of the block: of a block with a residual path, the cosine itself is largest where the block does least, and
calls the first block the least important, which the paper finds to be the most important one of every model.

`block_influence`: minimises Σ s φ + ε Σ φ log φ over shares φ that are removed, at a given mean: φ = L φ̄ softmax(-s/ε)
over L blocks, with s = 1 minus the cosine of what a block is given and what it returns.  Blocks that do little lose
more; the larger ε, the more alike all are.  The paper chooses ε for every model; `EPSILON` is ours.  No site loses more
than `MOST` while another can still give; what that cap holds back is shared out in the same proportion.  Means are
weighted with bytes.

Source: Wang et al., SVD-LLM V2: Optimizing Singular Value Truncation for Large Language Model Compression, 2025
(arXiv 2503.12340).
Source: Mi et al., Layer-wise dynamic rank for compressing large language models, 2025 (arXiv 2509.25622).
Source: Li et al., AdaSVD: Adaptive Singular Value Decomposition for Large Language Models, 2025 (arXiv 2502.01403).
Source: Lin et al., MoDeGPT: Modular Decomposition for Large Language Model Compression, 2024 (arXiv 2408.09632).
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from tersely.allocate.base import Curve, Plan, error_of, neediest, too_small
from tersely.allocate.measures import Measures
from tersely.errors import RecipeError
from tersely.option import Option

EPSILON = 0.1
"""Of `block_influence`: the difference in s at which one block loses e times as much as another."""

MOST = 0.8
"""Of `block_influence`: the largest share that a site loses while others can still give."""


def uniform(curves: Sequence[Curve], budget: int) -> Plan:
    """The same share for every site: its largest option within budget / dense bytes of its own dense size.

    A budget is a whole number of bytes, rounded down from a share that was asked for; every share below that of
    budget + 1 is therefore granted, and the sum stays within the budget all the same.
    """
    dense = sum(curve.dense_bytes for curve in curves)
    chosen = []
    for curve in curves:
        within = [option for option in curve.options if option.nbytes * dense < (budget + 1) * curve.dense_bytes]
        if not within:
            least = max(curve.options[0].nbytes / curve.dense_bytes for curve in curves)
            raise RecipeError(too_small(curve, f"a share of {budget * curve.dense_bytes // dense} bytes", least))
        chosen.append(within[-1])
    return Plan.of(curves, chosen, budget)


def svd_llm_v2(curves: Sequence[Curve], budget: int) -> Plan:
    """Every role keeps the same share; within it a site is removed in proportion to 1 / log(1 + its loss there)."""
    dense = sum(curve.dense_bytes for curve in curves)
    chosen: dict[str, Option] = {}
    for role in dict.fromkeys(curve.role for curve in curves):
        group = [curve for curve in curves if curve.role == role]
        own = sum(curve.dense_bytes for curve in group)
        # the most whole bytes below the share of budget + 1, as in `uniform`; the sum over roles is within the budget
        granted = ((budget + 1) * own - 1) // dense
        smallest = sum(curve.options[0].nbytes for curve in group)
        if smallest > granted:
            least = max(
                sum(c.options[0].nbytes for c in curves if c.role == r)
                / sum(c.dense_bytes for c in curves if c.role == r)
                for r in dict.fromkeys(curve.role for curve in curves)
            )
            came = f"{granted} bytes for {role or 'all sites'} where the smallest plan takes {smallest}"
            raise RecipeError(too_small(neediest(group), came, least))
        steadiness = [math.log1p(math.sqrt(c.tokens * _error_at(c, budget * c.dense_bytes / dense))) for c in group]

        def level(site: int, option: Option, group: Sequence[Curve] = group, by: Sequence[float] = steadiness) -> float:
            return (option.nbytes / group[site].dense_bytes - 1) * by[site]

        chosen |= dict(zip([curve.site for curve in group], _risen(group, granted, level), strict=True))
    return Plan.of(curves, [chosen[curve.site] for curve in curves], budget)


def effective_rank(curves: Sequence[Curve], budget: int) -> Plan:
    """Ranks in proportion to √(effective rank / bytes of a rank)."""
    widths = [math.sqrt(c.spectrum.effective_rank * c.spectrum.step_bytes) if c.spectrum else 0.0 for c in curves]
    return _in_proportion(curves, budget, widths)


def importance(curves: Sequence[Curve], budget: int, measures: Measures) -> Plan:
    """Half of the uniform share is sure; the other half is given out by how much the site's block changes."""
    # rounding can make a cosine larger than 1
    changed = [max(1 - measures.similarity[c.site], 0.0) if measures.similarity else 1.0 for c in curves]
    mean = sum(x * c.dense_bytes for x, c in zip(changed, curves, strict=True)) / sum(c.dense_bytes for c in curves)
    relative = [x / mean if mean > 0 else 1.0 for x in changed]
    return _in_proportion(curves, budget, [c.dense_bytes * (1 + i) / 2 for c, i in zip(curves, relative, strict=True)])


def block_influence(curves: Sequence[Curve], budget: int, measures: Measures) -> Plan:
    """What is removed goes by exp(-s / ε), no site losing more than `MOST` unless the budget leaves no other choice."""
    _require_room(curves, budget)
    done = [1 - measures.similarity[curve.site] if measures.similarity else 0.0 for curve in curves]
    # relative to the block that does least, so that nothing overflows
    steadiness = [math.exp((s - min(done)) / EPSILON) for s in done]
    # all sites reach the cap at the same level, below every level above it
    first = MOST * max(steadiness)

    def level(site: int, option: Option) -> float:
        removed = 1 - option.nbytes / curves[site].dense_bytes
        return -removed * steadiness[site] if removed < MOST else -first * (1 + removed - MOST)

    return Plan.of(curves, _risen(curves, budget, level), budget)


def _in_proportion(curves: Sequence[Curve], budget: int, widths: Sequence[float]) -> Plan:
    """Bytes in proportion to `widths`, as far as the options of a site go."""
    _require_room(curves, budget)
    risen = _risen(curves, budget, lambda site, o: o.nbytes / widths[site] if widths[site] > 0 else math.inf)
    return Plan.of(curves, risen, budget)


def _require_room(curves: Sequence[Curve], budget: int) -> None:
    smallest = sum(curve.options[0].nbytes for curve in curves)
    if smallest > budget:
        came = f"a total budget of {budget} bytes where the smallest plan takes {smallest}"
        least = smallest / sum(curve.dense_bytes for curve in curves)
        raise RecipeError(too_small(neediest(curves), came, least))


def _risen(curves: Sequence[Curve], budget: int, level: Callable[[int, Option], float]) -> list[Option]:
    """The options that lie below the highest level at which all of them fit, and the smallest of a site at least.

    `level` of (number of the curve, option) does not fall as bytes rise.  Those that are reached at the same level are
    taken together or not at all.
    """
    chosen = [curve.options[0] for curve in curves]
    spent = sum(option.nbytes for option in chosen)
    later = [(level(i, option), i, k) for i, curve in enumerate(curves) for k, option in enumerate(curve.options) if k]
    for _, reached in groupby(sorted(later), key=lambda step: step[0]):
        risen = {
            i: curves[i].options[k] for _, i, k in reached
        }  # of several options of a site the largest, sorted last
        spent += sum(option.nbytes - chosen[i].nbytes for i, option in risen.items())
        if spent > budget:
            break
        for i, option in risen.items():
            chosen[i] = option
    return chosen


def _error_at(curve: Curve, nbytes: float) -> float:
    """The error that a site is left with at so many bytes, on the straight line between two options."""
    first = curve.options[0]
    if nbytes <= first.nbytes:
        return error_of(first)
    above = next((k for k, option in enumerate(curve.options) if option.nbytes >= nbytes), len(curve.options) - 1)
    low, high = curve.options[above - 1], curve.options[above]
    part = min((nbytes - low.nbytes) / (high.nbytes - low.nbytes), 1.0) if high.nbytes > low.nbytes else 1.0
    return error_of(low) + part * (error_of(high) - error_of(low))
