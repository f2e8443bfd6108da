"""A plan keeps its budget, the knapsack is the optimum, and greedy is that up to the one segment that no longer fits.

What holds for greedy, with loss = the sum over sites of dense bytes · predicted relative error:

    relaxed optimum ≤ best plan ≤ greedy ≤ relaxed optimum + what the refused segment would have removed,

where the relaxed optimum may stop anywhere on a convex hull.  So greedy is optimal wherever a vertex of its hulls meets
the budget, and elsewhere it can lose to the best plan, even to the uniform one, by at most one segment: an example is
below.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from tersely.allocate import (
    ALLOCATORS,
    POINTS,
    Choice,
    Curve,
    Measures,
    Plan,
    Spectrum,
    block_influence,
    consensus,
    curve_of,
    effective_rank,
    greedy,
    importance,
    knapsack,
    lems,
    lems_probe,
    optimum,
    ratio_probes,
    sensitivity,
    svd_llm_v2,
    uniform,
)
from tersely.allocate.shares import EPSILON, MOST
from tersely.errors import NumericalError, RecipeError
from tersely.methods.low_rank.svd import PlainSVD
from tersely.option import Option
from tersely.stats import Stats

every_allocator = pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=ALLOCATORS)
BY_SHARE = (uniform, svd_llm_v2)
"""Those that refuse a budget of which not everyone's share buys something."""
SLACK = 1e-9  # rounding of losses of up to a few hundred bytes
quick = settings(max_examples=150, deadline=None, database=None)


def dense_bytes(curves: Sequence[Curve]) -> int:
    return sum(curve.dense_bytes for curve in curves)


def least_bytes(curves: Sequence[Curve]) -> int:
    return sum(curve.options[0].nbytes for curve in curves)


def chosen(curve: Curve, plan: Plan) -> Option:
    (option,) = [option for option in curve.options if option.amount == plan.choices[curve.site].amount]
    return option


def loss(plan: Plan, curves: Sequence[Curve]) -> float:
    return float(sum(exact(curve, chosen(curve, plan)) for curve in curves))


def exact(curve: Curve, option: Option) -> Fraction:
    """The loss of a site without rounding: its bytes, times the share of the avoidable error that is not avoided."""
    avoidable = Fraction(curve.options[0].error)
    return curve.dense_bytes * Fraction(option.error) / avoidable if avoidable else Fraction(0)


def best(curves: Sequence[Curve], budget: int) -> Fraction:
    """The least loss of all plans within the budget, by trying every one."""
    plans = product(*(curve.options for curve in curves))
    affordable = (plan for plan in plans if sum(option.nbytes for option in plan) <= budget)
    return min(sum(exact(c, o) for c, o in zip(curves, plan, strict=True)) for plan in affordable)


def relaxed(curves: Sequence[Curve], budget: int) -> tuple[Fraction, Fraction]:
    """The relaxed optimum as the best Lagrangian bound, max over prices of min loss + price · (bytes - budget), and the
    drop in loss of the largest hull segment that has this price."""
    steps = [(c, a, b) for c in curves for a, b in product(c.options, c.options) if a.nbytes < b.nbytes]
    prices = {(exact(c, a) - exact(c, b)) / (b.nbytes - a.nbytes) for c, a, b in steps}
    found = []
    for price in {max(p, Fraction(0)) for p in prices} | {Fraction(0)}:
        value, segments = -price * budget, []
        for curve in curves:
            cost = {option: exact(curve, option) + price * option.nbytes for option in curve.options}
            cheapest = [exact(curve, option) for option in curve.options if cost[option] == min(cost.values())]
            value += min(cost.values())
            segments.append(max(cheapest) - min(cheapest))
        found.append((value, max(segments)))
    return max(found)


@st.composite
def some_curves(draw: st.DrawFn, sites: int = 3) -> list[Curve]:
    """Curves of any shape: rising bytes, errors between nothing and everything, mostly not convex; drifts of any
    sign."""
    curves = []
    for site in range(draw(st.integers(1, sites))):
        nbytes = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=5)))
        energy = draw(st.integers(1, 50))
        options = [Option(0, 0, float(energy))]
        options += [Option(k, b, float(draw(st.integers(1, energy)))) for k, b in enumerate(nbytes, start=1)]
        signed = [replace(option, drift=(-1.0) ** place * option.error) for place, option in enumerate(options)]
        curves.append(curve_of(f"site.{site}", signed, draw(st.integers(nbytes[0] + 1, 40))))
    return curves


@st.composite
def convex_curves(draw: st.DrawFn, sites: int = 3) -> list[Curve]:
    """Curves whose every step removes less per byte than the one before."""
    curves = []
    for site in range(draw(st.integers(1, sites))):
        widths = draw(st.lists(st.integers(1, 10), min_size=1, max_size=5))
        slopes = sorted(draw(st.sets(st.integers(1, 40), min_size=len(widths), max_size=len(widths))), reverse=True)
        first = draw(st.integers(1, 5))
        drops = [width * slope for width, slope in zip(widths, slopes, strict=True)]
        options = [Option(k + 1, first + sum(widths[:k]), float(sum(drops[k:]))) for k in range(len(widths))]
        energy = options[0].error + first * 41
        curves.append(curve_of(f"site.{site}", [Option(0, 0, energy), *options], first + sum(widths)))
    return curves


@st.composite
def with_budget(draw: st.DrawFn, curves: st.SearchStrategy[list[Curve]], budgets: int = 1) -> tuple:
    """Curves, and budgets from the smallest possible plan to more than everything, rising."""
    drawn = draw(curves)
    span = st.integers(least_bytes(drawn), dense_bytes(drawn) + 3)
    return drawn, *sorted(draw(span) for _ in range(budgets))


# --- the budget -------------------------------------------------------------------------------------------------------


@every_allocator
@quick
@given(case=with_budget(some_curves()))
def test_no_plan_exceeds_its_budget(allocator, case):
    curves, budget = case
    try:
        plan = allocator.divide(curves, budget)
    except RecipeError:
        # the others can always meet the bytes of the smallest plan
        assert allocator.rule in BY_SHARE
        return
    assert plan.nbytes <= budget == plan.budget
    assert plan.dense_bytes == dense_bytes(curves)
    assert list(plan.choices) == [curve.site for curve in curves]
    for curve in curves:
        choice, option = plan.choices[curve.site], chosen(curve, plan)
        assert (choice.nbytes, choice.dense_bytes) == (option.nbytes, curve.dense_bytes)
        assert choice.relative_error == pytest.approx(option.error / curve.energy, rel=1e-12)


@every_allocator
@quick
@given(case=with_budget(some_curves()))
def test_what_costs_as_much_as_the_dense_weight_is_never_chosen(allocator, case):
    curves, budget = case
    assert all(
        option.amount is None or option.nbytes < curve.dense_bytes for curve in curves for option in curve.options
    )
    try:
        plan = allocator.divide(curves, budget)
    except RecipeError:
        return
    for choice in plan.choices.values():
        assert choice.nbytes < choice.dense_bytes or choice == Choice(None, choice.dense_bytes, choice.dense_bytes, 0.0)


@every_allocator
@quick
@given(curves=some_curves())
def test_the_whole_budget_leaves_everything_dense(allocator, curves):
    plan = allocator.divide(curves, dense_bytes(curves))
    assert {choice.amount for choice in plan.choices.values()} == {None}
    assert loss(plan, curves) == 0.0
    assert plan.nbytes == plan.dense_bytes


@every_allocator
@quick
@given(curves=some_curves(), keep=st.floats(0.001, 0.999))
def test_a_budget_too_small_is_refused_with_one_that_is_just_enough(allocator, curves, keep):
    dense = dense_bytes(curves)
    try:
        allocator.divide(curves, int(keep * dense))
    except RecipeError as error:
        named, asked = re.search(r"^(\S+): .*keep at least ([\d.]+)$", str(error)).groups()
        assert named in {curve.site for curve in curves}
        allocator.divide(curves, int(float(asked) * dense * (1 + 1e-12)))
        if allocator.rule not in BY_SHARE:
            assert float(asked) * dense <= least_bytes(curves) + 0.001 * dense


# --- greedy -----------------------------------------------------------------------------------------------------------


@quick
@given(with_budget(some_curves(sites=4), budgets=2))
@pytest.mark.parametrize("divide", [greedy, knapsack])
def test_more_bytes_never_predict_more_error(divide, case):
    curves, less, more = case
    assert loss(divide(curves, more), curves) <= loss(divide(curves, less), curves) + SLACK


@quick
@given(with_budget(some_curves()))
def test_greedy_is_within_one_segment_of_what_no_plan_can_beat(case):
    curves, budget = case
    bound, segment = relaxed(curves, budget)
    reached = loss(greedy(curves, budget), curves)
    assert bound <= best(curves, budget) <= reached + SLACK
    assert reached <= bound + segment + SLACK


@quick
@given(with_budget(convex_curves()))
def test_on_convex_curves_only_the_refused_step_is_missing(case):
    curves, budget = case
    plan = greedy(curves, budget)
    least = best(curves, budget)
    missing = [Fraction(0)]
    for curve in curves:
        amounts = [option.amount for option in curve.options]
        at = amounts.index(plan.choices[curve.site].amount)
        missing += [exact(curve, a) - exact(curve, b) for a, b in pairwise(curve.options[at : at + 2])]
    assert least <= loss(plan, curves) + SLACK
    assert loss(plan, curves) <= least + max(missing) + SLACK
    if plan.nbytes == min(budget, dense_bytes(curves)):
        assert loss(plan, curves) == pytest.approx(float(least), abs=SLACK)


@quick
@given(with_budget(some_curves()))
def test_greedy_loses_to_uniform_by_less_than_one_segment_if_at_all(case):
    curves, budget = case
    try:
        share = uniform(curves, budget)
    except RecipeError:
        return
    _, segment = relaxed(curves, budget)
    assert loss(greedy(curves, budget), curves) <= loss(share, curves) + segment + SLACK


def test_the_one_segment_can_make_uniform_the_better_plan():
    """The steepest segment takes 40 bytes where 39 are left, and greedy ends there; uniform improves the other site."""
    coarse = curve_of("coarse", [Option(0, 0, 2.0), Option(1, 10, 1.0)], 50)
    fine = curve_of("fine", [Option(0, 0, 2.0), Option(1, 10, 1.0), Option(2, 40, 0.66)], 110)
    both = [coarse, fine]
    ours, theirs = greedy(both, 59), uniform(both, 59)
    assert (loss(theirs, both), theirs.nbytes) == (pytest.approx(122.6), 50)
    assert loss(ours, both) > loss(theirs, both)
    assert loss(ours, both) < loss(theirs, both) + 50  # the segment would have removed all of the coarse site's loss


@quick
@given(case=with_budget(some_curves()), factor=st.sampled_from([2.0**-60, 0.125, 2.0**60]), data=st.data())
@pytest.mark.parametrize("divide", [greedy, knapsack])
def test_the_unit_of_a_sites_error_does_not_matter(divide, case, factor, data):
    curves, budget = case
    at = data.draw(st.integers(0, len(curves) - 1))
    options = [Option(o.amount, o.nbytes, o.error * factor) for o in curves[at].options]
    other = Curve(curves[at].site, curves[at].dense_bytes, curves[at].energy * factor, tuple(options))
    scaled = divide([*curves[:at], other, *curves[at + 1 :]], budget)
    assert scaled == divide(curves, budget)


@pytest.mark.parametrize("divide", [greedy, knapsack])
def test_a_site_without_energy_gets_the_least(divide):
    dead = curve_of("dead", [Option(r, 4 * r, 0.0) for r in range(5)], 20)
    alive = curve_of("alive", [Option(r, 4 * r, 5.0 - r) for r in range(5)], 20)
    plan = divide([dead, alive], 30)
    assert plan.choices == {"dead": Choice(1, 4, 20, 0.0), "alive": Choice(None, 20, 20, 0.0)}


# --- knapsack ---------------------------------------------------------------------------------------------------------


@quick
@given(with_budget(some_curves(sites=4)))
def test_the_knapsack_is_the_best_of_all_plans(case):
    curves, budget = case
    assert loss(knapsack(curves, budget), curves) == pytest.approx(float(best(curves, budget)), abs=SLACK)


@quick
@given(with_budget(some_curves(sites=4)))
def test_the_knapsack_is_never_worse_than_greedy_and_does_the_same_twice(case):
    curves, budget = case
    plan = knapsack(curves, budget)
    assert loss(plan, curves) <= loss(greedy(curves, budget), curves)
    assert plan == knapsack(curves, budget)


def many_curves(sites: int, points: int, seed: int) -> list[Curve]:
    """Curves as models have them: bytes in steps of a few sizes, errors that fall by orders of magnitude."""
    random = numpy.random.default_rng(seed)
    curves = []
    for site in range(sites):
        step = int(random.choice([16384, 30208, 256]))
        nbytes = step * numpy.sort(random.choice(4 * points, points, replace=False) + 1)
        errors = numpy.sort(random.lognormal(0, 2, points))[::-1]
        options = [Option(k, int(b), float(e)) for k, (b, e) in enumerate(zip(nbytes, errors, strict=True), start=1)]
        curves.append(curve_of(f"site.{site}", options, step * (4 * points + 1)))
    return curves


def solved(curves: Sequence[Curve], budget: int) -> float:
    """The least loss by a solver of integer programs: which option of which site, 0 or 1."""
    owned = [(site, option) for site, curve in enumerate(curves) for option in curve.options]
    losses = numpy.array([float(exact(curves[site], option)) for site, option in owned])
    nbytes = numpy.array([option.nbytes for _, option in owned]) / budget
    one_each = numpy.array([[float(site == wanted) for site, _ in owned] for wanted in range(len(curves))])
    found = milp(
        losses / losses.max(),
        integrality=numpy.ones(len(owned)),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(nbytes[None], 0, 1)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0
    return float(found.fun * losses.max())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.2, 0.4, 0.7])
def test_the_knapsack_agrees_with_a_solver_of_integer_programs(seed, keep):
    curves = many_curves(12, 12, seed)
    budget = int(keep * dense_bytes(curves))
    assert loss(knapsack(curves, budget), curves) == pytest.approx(solved(curves, budget), rel=1e-5)


def test_a_large_division_is_exact_too():
    """As many sites as a model of 7 billion weights has; more sites make the relaxed bound tighter, never worse."""
    curves = many_curves(224, POINTS - 1, 0)
    budget = int(0.3 * dense_bytes(curves))
    ours, theirs = knapsack(curves, budget), greedy(curves, budget)
    assert loss(ours, curves) < loss(theirs, curves)
    assert theirs.nbytes < ours.nbytes <= budget


def test_too_many_equal_plans_are_refused(monkeypatch):
    monkeypatch.setattr(optimum, "STATES", 3)
    curves = many_curves(12, 12, 0)
    with pytest.raises(NumericalError, match="use the greedy allocator"):
        knapsack(curves, int(0.4 * dense_bytes(curves)))


# --- uniform ----------------------------------------------------------------------------------------------------------


def size_curve(site: str, shape: tuple[int, int], itemsize: int = 2) -> Curve:
    return curve_of(site, PlainSVD().sizes(shape, itemsize), shape[0] * shape[1] * itemsize)


def paper_rank(shape: tuple[int, int], keep: str) -> int:
    """floor(keep · m n / (m + n)), with keep as it is written and not as it is stored."""
    return math.floor(Fraction(keep) * shape[0] * shape[1] / sum(shape))


def budget_of(curves: Sequence[Curve], keep: str) -> int:
    return int(float(keep) * dense_bytes(curves) * (1 + 1e-12))


sides = st.integers(1, 48)
keeps = st.integers(1, 999).map(lambda thousandths: str(thousandths / 1000))


@settings(max_examples=400, deadline=None, database=None)
@given(shape=st.tuples(sides, sides), itemsize=st.sampled_from([2, 4]), keep=keeps)
def test_the_uniform_rank_is_that_of_the_papers(shape, itemsize, keep):
    curve = size_curve("site", shape, itemsize)
    wanted = paper_rank(shape, keep)
    if wanted == 0:
        with pytest.raises(RecipeError, match="keep at least"):
            uniform([curve], budget_of([curve], keep))
    else:
        (choice,) = uniform([curve], budget_of([curve], keep)).choices.values()
        assert choice == Choice(wanted, wanted * sum(shape) * itemsize, curve.dense_bytes, None)


@settings(max_examples=200, deadline=None, database=None)
@given(shapes=st.lists(st.tuples(sides, sides), min_size=2, max_size=4), keep=keeps)
def test_several_weights_have_the_ranks_of_the_papers_too(shapes, keep):
    """The budget is in whole bytes: it must not cost a rank, and can give one where less than a byte was missing."""
    wanted = [paper_rank(shape, keep) for shape in shapes]
    assume(min(wanted) > 0)
    curves = [size_curve(f"site.{k}", shape) for k, shape in enumerate(shapes)]
    plan = uniform(curves, budget_of(curves, keep))
    for choice, rank in zip(plan.choices.values(), wanted, strict=True):
        assert choice.amount >= rank
        assert choice.amount == rank or choice.nbytes < Fraction(keep) * choice.dense_bytes + 1


@pytest.mark.parametrize("keep", ["0.2", "0.35", "0.6", "0.8", "0.9"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "shape",
    [(20, 20), (100, 100), (60, 30), (300, 700), (768, 768), (768, 3072), (4096, 4096), (14336, 4096)],
    ids=str,
)
def test_uniform_ranks_are_exact_for_weights_of_any_size(shape, itemsize, keep):
    """Where keep · m n / (m + n) is whole on paper, binary fractions must not cost a rank; nor must thinned curves."""
    curve = size_curve("site", shape, itemsize)
    plan = uniform([curve], budget_of([curve], keep))
    assert plan.choices["site"].amount == paper_rank(shape, keep)


def test_a_share_is_not_made_smaller_by_its_neighbours():
    """0.8 of the small weight is rank 8 exactly; the odd size of the other one must not round it down."""
    curves = [size_curve("small", (20, 20), 4), size_curve("odd", (32, 44), 4)]
    assert uniform(curves, budget_of(curves, "0.8")).choices["small"].amount == paper_rank((20, 20), "0.8") == 8


@quick
@given(with_budget(some_curves(), budgets=2))
def test_no_site_takes_more_than_its_share_or_leaves_an_option_unused(case):
    curves, less, more = case
    try:
        small, large = uniform(curves, less), uniform(curves, more)
    except RecipeError:
        return
    dense = dense_bytes(curves)
    for curve in curves:
        chosen = small.choices[curve.site].nbytes
        assert chosen * dense < (less + 1) * curve.dense_bytes
        larger = [option.nbytes for option in curve.options if option.nbytes > chosen]
        assert not larger or larger[0] * dense > less * curve.dense_bytes
        assert chosen <= large.choices[curve.site].nbytes


# --- curves and plans -------------------------------------------------------------------------------------------------


@given(st.integers(1, 1500))
@settings(max_examples=30, deadline=None, database=None)
def test_a_long_curve_is_thinned_between_its_ends(ranks):
    options = [Option(r, 10 * r, float(ranks - r + 1)) for r in range(ranks + 1)]
    curve = curve_of("site", options, 10 * ranks + 10)
    *kept, dense = curve.options
    assert dense == Option(None, 10 * ranks + 10, 0.0)
    assert curve.energy == ranks + 1
    assert len(kept) == min(ranks, POINTS)
    assert kept[0] == options[1] and kept[-1] == options[-1]
    assert all(option in options for option in kept)
    steps = [second.amount - first.amount for first, second in pairwise(kept)]
    assert all(step >= 1 for step in steps)
    assert max(steps, default=1) - min(steps, default=1) <= 1


def test_a_curve_without_errors_says_so():
    curve = size_curve("site", (6, 4))
    assert curve.energy is None
    assert {curve.relative(option) for option in curve.options} == {None}
    # rank 2 of 6 x 4 takes 20 of 24 numbers, rank 3 would take 30
    assert [option.amount for option in curve.options] == [1, 2, None]


def test_options_of_several_methods_make_one_curve():
    """Ranks and widths in any order; what is larger and worse than another option is dropped."""
    ranks = [Option({"rank": r}, 10 * r, 8.0 - r) for r in range(1, 8)]
    widths = [Option({"bits": b}, 12 * b, 2.0 ** (3 - 2 * b)) for b in (2, 4)]
    curve = curve_of("site", [Option(0, 0, 9.0), *ranks, *widths], 80)
    assert [o.amount for o in curve.options] == [{"rank": 1}, {"rank": 2}, {"bits": 2}, {"bits": 4}, None]
    for divide in (uniform, greedy, knapsack):
        plan = divide([curve], 50)
        assert plan.choices["site"] == Choice({"bits": 4}, 48, 80, pytest.approx(2.0**-5 / 9))
        assert Plan.from_json(plan.to_json()) == plan


def test_errors_may_have_been_measured_without_the_energy():
    """Of a sensitivity that was measured on the model nobody knows what removing the site would cost."""
    curve = curve_of("site", [Option(4, 40, 2.0), Option(8, 80, 1.0)], 100)
    assert curve.options[-1] == Option(None, 100, 0.0)
    for divide in (greedy, knapsack):
        assert divide([curve], 90).choices["site"] == Choice(8, 80, 100, None)


amounts = st.integers(1, 10**6) | st.dictionaries(st.sampled_from(["rank", "bits", "group"]), st.integers(1, 64))
choices = st.builds(
    Choice,
    amount=st.none() | amounts,
    nbytes=st.integers(0, 10**12),
    dense_bytes=st.integers(0, 10**12),
    relative_error=st.none() | st.floats(0, 1),
)


@quick
@given(st.builds(Plan, budget=st.integers(0, 10**13), choices=st.dictionaries(st.text(), choices, max_size=5)))
def test_a_plan_reads_back_as_it_was_written(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert list(Plan.from_json(plan.to_json()).choices) == list(plan.choices)


# --- shares -----------------------------------------------------------------------------------------------------------


def fine_curve(site: str, size: int, error: float = 1.0, role: str = "", rank: float = 1.0, tokens: int = 1) -> Curve:
    """One byte a step, the same error everywhere but at nothing removed: as good as continuous."""
    options = (*(Option(b, b, error) for b in range(1, size)), Option(None, size, 0.0))
    return Curve(site, size, error, options, role, tokens, Spectrum(rank, 1.0))


@quick
@given(
    errors=st.lists(st.floats(0.5, 1e6), min_size=2, max_size=5),
    keep=st.integers(30, 95),
    tokens=st.sampled_from([1, 4096]),
)
def test_v2_removes_by_the_inverse_logarithm_of_the_loss_and_on_average_what_was_asked(errors, keep, tokens):
    """R_i = n R c_i / Σ c with c = 1 / log(1 + L): equal to a byte, hence the mean is R to a byte."""
    curves = [fine_curve(str(k), 1000, error, tokens=tokens) for k, error in enumerate(errors)]
    scores = [1 / math.log1p(math.sqrt(tokens * error)) for error in errors]
    removed = [len(errors) * (1000 - 10 * keep) * score / sum(scores) for score in scores]
    assume(max(removed) < 999)
    plan = svd_llm_v2(curves, 10 * keep * len(errors))
    for curve, share in zip(curves, removed, strict=True):
        assert plan.choices[curve.site].nbytes == pytest.approx(1000 - share, abs=len(errors) + 1)
    assert 0 <= plan.budget - plan.nbytes < len(errors)


def test_v2_gives_what_one_site_cannot_lose_to_the_others_of_its_role():
    curves = [fine_curve("loud", 1000, 1e12), fine_curve("quiet", 1000, 1e-4)]
    plan = svd_llm_v2(curves, 700)
    # the quiet one alone would lose nearly all of the 1300 bytes, and has 999
    assert {site: choice.nbytes for site, choice in plan.choices.items()} == {"loud": 699, "quiet": 1}


@quick
@given(with_budget(some_curves(sites=4)), st.data())
def test_v2_keeps_every_role_at_its_share(case, data):
    curves, budget = case
    curves = [replace(c, role=data.draw(st.sampled_from(["attention.q", "mlp.up"]))) for c in curves]
    try:
        plan = svd_llm_v2(curves, budget)
    except RecipeError:
        return
    for role in {curve.role for curve in curves}:
        group = [curve for curve in curves if curve.role == role]
        spent = sum(plan.choices[curve.site].nbytes for curve in group)
        assert spent * dense_bytes(curves) < (budget + 1) * dense_bytes(group)


@pytest.mark.parametrize(
    ("energies", "rank"), [([4.0] * 6, 6.0), ([7.0, 0, 0, 0, 0, 0], 1.0), ([1, 1, 1, 0, 0, 0], 3.0), ([0.0] * 6, 1.0)]
)
def test_the_effective_rank_counts_the_directions_that_matter(energies, rank):
    left = [sum(energies[k:]) for k in range(7)]
    curve = curve_of("site", [Option(k, 10 * k, float(error)) for k, error in enumerate(left)], 35)
    assert curve.spectrum.effective_rank == pytest.approx(rank)
    assert curve.spectrum.step_bytes == 10


def test_the_effective_rank_is_that_of_all_ranks_and_not_of_those_that_pay():
    """Beyond break-even and between the points of a thinned curve lie singular values that count too."""
    generator = numpy.random.default_rng(0)
    weight = torch.from_numpy(generator.standard_normal((700, 600)))
    shares = torch.linalg.svdvals(weight).square()
    shares = shares / shares.sum()
    curve = curve_of("site", PlainSVD().options(weight, Stats()), weight.nbytes)
    assert len(curve.options) == POINTS + 1
    assert curve.spectrum.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-9)
    assert curve.spectrum.step_bytes == 1300 * 8


@quick
@given(
    sites=st.lists(st.tuples(st.floats(1, 400), st.integers(1, 30), st.integers(400, 900)), min_size=2, max_size=4),
    keep=st.floats(0.1, 0.95),
)
def test_ranks_by_effective_rank_minimise_what_the_paper_minimises(sites, keep):
    """Σ R/k at Σ ω k = budget and k within what a site has: no bytes moved between two sites make it less."""
    curves = [
        replace(fine_curve(str(k), size), spectrum=Spectrum(rank, width)) for k, (rank, width, size) in enumerate(sites)
    ]
    plan = effective_rank(curves, int(keep * dense_bytes(curves)))
    got = [plan.choices[curve.site].nbytes for curve in curves]

    def cost(nbytes: Sequence[float]) -> float:
        return sum(rank * width / b for (rank, width, _), b in zip(sites, nbytes, strict=True))

    for giver, taker in product(range(len(sites)), repeat=2):
        moved = list(got)
        moved[giver] -= 8
        moved[taker] += 8
        if giver != taker and moved[giver] > 0 and moved[taker] <= sites[taker][2]:
            assert cost(moved) >= cost(got)


def test_ranks_by_effective_rank_are_the_closed_form_where_nothing_is_capped():
    curves = [
        replace(fine_curve(str(k), 10_000), spectrum=Spectrum(r, w)) for k, (r, w) in enumerate([(9, 4), (25, 1)])
    ]
    plan = effective_rank(curves, 5500)
    # √(9 · 4) : √(25 · 1) = 6 : 5
    assert [choice.nbytes for choice in plan.choices.values()] == [3000, 2500]


@quick
@given(
    similar=st.lists(st.floats(-0.5, 0.95), min_size=2, max_size=5),
    sizes=st.lists(st.integers(500, 900), min_size=5, max_size=5),
    keep=st.floats(0.05, 0.6),
)
def test_importance_keeps_on_average_what_was_asked(similar, sizes, keep):
    """ρ = mrr + I (trr - mrr) with mrr half of trr and I = (1 - cosine) / mean; the mean over bytes is trr."""
    curves = [fine_curve(str(k), sizes[k]) for k in range(len(similar))]
    dense = dense_bytes(curves)
    changed = [1 - s for s in similar]
    mean = sum(x * c.dense_bytes for x, c in zip(changed, curves, strict=True)) / dense
    kept = [keep / 2 + x / mean * (keep - keep / 2) for x in changed]
    assume(max(kept) < 0.99 and min(kept) > 0.01)
    plan = importance(curves, int(keep * dense), Measures({c.site: s for c, s in zip(curves, similar, strict=True)}))
    for curve, share in zip(curves, kept, strict=True):
        assert plan.choices[curve.site].nbytes == pytest.approx(share * curve.dense_bytes, abs=len(curves) + 2)
    assert 0 <= plan.budget - plan.nbytes < len(curves)


def test_a_block_that_changes_nothing_keeps_what_is_sure():
    curves = [fine_curve("idle", 1000), fine_curve("works", 1000)]
    plan = importance(curves, 800, Measures({"idle": 1 + 1e-9, "works": 0.2}))
    assert {site: choice.nbytes for site, choice in plan.choices.items()} == {"idle": 200, "works": 600}
    plan = importance(curves, 800, Measures({"idle": 1.0, "works": 1.0}))
    assert {choice.nbytes for choice in plan.choices.values()} == {400}


@quick
@given(similar=st.lists(st.floats(0.3, 1.0), min_size=2, max_size=6), keep=st.floats(0.75, 0.98))
def test_influence_removes_by_a_softmax_over_blocks(similar, keep):
    """L φ̄ softmax(-s/ε), to a byte, as long as that does not exceed the cap."""
    curves = [fine_curve(str(k), 1000) for k in range(len(similar))]
    budget = int(keep * 1000 * len(similar))
    weights = [math.exp(-(1 - s) / EPSILON) for s in similar]
    removed = [(1000 * len(similar) - budget) * w / sum(weights) for w in weights]
    assume(max(removed) < 1000 * MOST)
    plan = block_influence(curves, budget, Measures({str(k): s for k, s in enumerate(similar)}))
    for choice, wanted in zip(plan.choices.values(), removed, strict=True):
        assert choice.dense_bytes - choice.nbytes == pytest.approx(wanted, abs=2 + len(similar))
    assert budget - len(similar) <= plan.nbytes <= budget


def test_influence_takes_no_more_than_the_cap_and_shares_out_the_rest():
    curves = [fine_curve(name, 1000) for name in ("idle", "works", "works as much")]
    similar = Measures({"idle": 1.0, "works": 0.5, "works as much": 0.5})
    plan = block_influence(curves, 1500, similar)
    assert [choice.nbytes for choice in plan.choices.values()] == pytest.approx([200, 650, 650], abs=2)
    # below a fifth of everything the cap gives way, evenly
    plan = block_influence(curves, 450, similar)
    assert [choice.nbytes for choice in plan.choices.values()] == pytest.approx([150, 150, 150], abs=2)
    alike = block_influence(curves, 1500, Measures(dict.fromkeys(similar.similarity, 0.7)))
    assert [choice.nbytes for choice in alike.choices.values()] == pytest.approx([500, 500, 500], abs=2)


def test_the_effective_rank_of_a_unit_counts_the_steps_that_it_offers():
    """Units say how much they keep of several parts at once; a step of all of them is what a rank is to a linear."""
    falls = [8.0, 4.0, 2.0, 1.0, 0.5]
    left = [sum(falls[k:]) for k in range(len(falls) + 1)]
    ranks = curve_of("linear", [Option(k, 10 * k, e) for k, e in enumerate(left)], 100)
    parts = [Option(0, 0, left[0]), *(Option({"qk": k, "vo": 2 * k}, 10 * k, e) for k, e in enumerate(left) if k)]
    unit = curve_of("unit", parts, 100)
    assert unit.spectrum == ranks.spectrum and unit.spectrum.step_bytes == 10
    plan = effective_rank([unit, ranks], 60)
    assert plan.choices["unit"].nbytes == plan.choices["linear"].nbytes == 30
    assert plan.choices["unit"].amount == {"qk": 3, "vo": 6}


@pytest.mark.parametrize("divide", [lems, sensitivity, importance])
def test_a_site_that_was_not_measured_among_others_is_a_mistake(divide):
    curves = [fine_curve("one", 10), fine_curve("two", 10)]
    with pytest.raises(KeyError, match="two"):
        divide(curves, 15, Measures({"one": 0.5}, {"one": dict.fromkeys(range(10), 1.0)}))


# --- measured on the model --------------------------------------------------------------------------------------------


@st.composite
def measured_curves(draw: st.DrawFn) -> tuple[list[Curve], list[Fraction], Measures]:
    """Curves; what a unit of error of each site does to the model; and the measurements that tell it."""
    curves = draw(some_curves(sites=4))
    rates = [draw(st.integers(1, 40)) for _ in curves]
    harm = {c.site: {o.nbytes: r * o.error for o in lems_probe(c)} for c, r in zip(curves, rates, strict=True)}
    return curves, [Fraction(rate) for rate in rates], Measures(harm=harm)


@quick
@given(measured_curves(), st.data())
def test_lems_with_exact_divergences_is_the_best_of_all_plans(case, data):
    curves, rates, measures = case
    budget = data.draw(st.integers(least_bytes(curves), dense_bytes(curves) + 3))

    def suffered(options: Sequence[Option]) -> Fraction:
        return sum((r * Fraction(o.error) for r, o in zip(rates, options, strict=True)), Fraction(0))

    plan = lems(curves, budget, measures)
    plans = (p for p in product(*(c.options for c in curves)) if sum(o.nbytes for o in p) <= budget)
    least = min(suffered(options) for options in plans)
    assert plan.nbytes <= budget
    assert suffered([chosen(c, plan) for c in curves]) == pytest.approx(float(least), abs=SLACK)


def test_lems_leaves_dense_what_the_model_cannot_do_without():
    """Both sites have the same curve, and knapsack cannot tell them apart."""
    options = [Option(r, 10 * r, 10.0 - r) for r in range(10)]
    curves = [curve_of("vital", options, 95), curve_of("idle", options, 95)]
    measures = Measures(harm={"vital": {10: 3.0}, "idle": {10: 0.01}})
    assert [o.nbytes for o in lems_probe(curves[0])] == [10]
    assert lems(curves, 120, measures).choices["vital"].amount is None
    assert lems(curves, 120, measures).choices["idle"].amount == 2


def test_a_consensus_gives_halfway_between_what_was_measured_and_what_was_learned():
    options = [Option(r, 10 * r, (20.0 - r) ** 2) for r in range(20)]
    curves = [curve_of(name, options, 195) for name in ("first", "second")]
    measures = Measures(harm={"first": {20: 9.0}, "second": {20: 1.0}}, learned={"first": 60.0, "second": 140.0})
    measured = lems(curves, 200, measures)
    assert measured.choices["first"].nbytes > 100  # where what was learned says the contrary
    plan = consensus(curves, 200, measures)
    for site, choice in plan.choices.items():
        wanted = (measured.choices[site].nbytes + measures.learned[site]) / 2
        assert abs(choice.nbytes - wanted) <= 10
    assert 190 < plan.nbytes <= 200
    assert consensus(curves, 200, Measures(harm=measures.harm)) == measured


def test_a_divergence_below_zero_is_rounding():
    curves = [curve_of(name, [Option(r, 10 * r, 4.0 - r) for r in range(4)], 35) for name in ("a", "b")]
    plan = lems(curves, 45, Measures(harm={"a": {10: -1e-9}, "b": {10: 1.0}}))
    assert {site: choice.nbytes for site, choice in plan.choices.items()} == {"a": 10, "b": 35}


def test_the_search_by_sensitivity_worked_by_hand():
    """Three sites of 100 bytes at ratios 0.3 and 0.6.  Sorted: a.3 (9), b.3 (8), c.3 (5), a.6 (4), c.6 (2), b.6 (1)."""
    curves = [curve_of(site, [Option(3, 30, 2.0), Option(6, 60, 1.0)], 100) for site in "abc"]
    harm = {"a": {30: 9.0, 60: 4.0}, "b": {30: 8.0, 60: 1.0}, "c": {30: 5.0, 60: 2.0}}
    expected = {
        # budget: bytes of a, b, c
        300: (100, 100, 100),
        299: (100, 60, 100),
        260: (100, 60, 100),
        259: (100, 60, 60),
        219: (60, 60, 60),
        179: (60, 60, 30),
        149: (60, 30, 30),
        119: (30, 30, 30),
        90: (30, 30, 30),
    }
    for budget, nbytes in expected.items():
        plan = sensitivity(curves, budget, Measures(harm=harm))
        assert tuple(choice.nbytes for choice in plan.choices.values()) == nbytes, budget


def test_a_smaller_ratio_that_hurts_less_than_a_larger_one_is_taken_first():
    curves = [curve_of("odd", [Option(3, 30, 2.0), Option(6, 60, 1.0)], 100), fine_curve("other", 100)]
    harm = {"odd": {30: 1.0, 60: 5.0}, "other": {o.nbytes: 9.0 for o in ratio_probes(curves[1])}}
    assert sensitivity(curves, 199, Measures(harm=harm)).choices["odd"].nbytes == 30


@quick
@given(some_curves())
def test_probes_are_options_of_their_curve(curves):
    for curve in curves:
        smaller = [o for o in curve.options if o.amount is not None]
        ratios, (tenth,) = ratio_probes(curve), lems_probe(curve)
        assert ratios[0] == smaller[0] and len(ratios) <= 10
        assert all(option in smaller for option in [*ratios, tenth])
        assert abs(tenth.nbytes - curve.dense_bytes / 10) == min(
            abs(o.nbytes - curve.dense_bytes / 10) for o in smaller
        )


def test_a_site_that_can_only_stay_dense_is_not_probed():
    stuck = curve_of("stuck", [], 10)
    assert ratio_probes(stuck) == lems_probe(stuck) == []
    for divide in (lems, sensitivity):
        assert divide([stuck], 10, Measures(harm={"stuck": {}, "x": {1: 1.0}})).choices["stuck"].amount is None
