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
from fractions import Fraction
from itertools import pairwise, product

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from tersely import allocate
from tersely.allocate import ALLOCATORS, POINTS, Choice, Curve, Plan, curve_of, greedy, knapsack, uniform
from tersely.errors import NumericalError, RecipeError
from tersely.methods.low_rank.svd import PlainSVD
from tersely.option import Option

every_allocator = pytest.mark.parametrize(
    "divide", [allocator.divide for allocator in ALLOCATORS.values()], ids=ALLOCATORS
)
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
    """Curves of any shape: rising bytes, errors between nothing and everything, mostly not convex."""
    curves = []
    for site in range(draw(st.integers(1, sites))):
        nbytes = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=5)))
        energy = draw(st.integers(1, 50))
        options = [Option(0, 0, float(energy))]
        options += [Option(k, b, float(draw(st.integers(1, energy)))) for k, b in enumerate(nbytes, start=1)]
        curves.append(curve_of(f"site.{site}", options, draw(st.integers(nbytes[0] + 1, 40))))
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
def test_no_plan_exceeds_its_budget(divide, case):
    curves, budget = case
    try:
        plan = divide(curves, budget)
    except RecipeError:
        # the others can always meet the bytes of the smallest plan; uniform also needs every share to buy something
        assert divide is uniform
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
def test_what_costs_as_much_as_the_dense_weight_is_never_chosen(divide, case):
    curves, budget = case
    assert all(
        option.amount is None or option.nbytes < curve.dense_bytes for curve in curves for option in curve.options
    )
    try:
        plan = divide(curves, budget)
    except RecipeError:
        return
    for choice in plan.choices.values():
        assert choice.nbytes < choice.dense_bytes or choice == Choice(None, choice.dense_bytes, choice.dense_bytes, 0.0)


@every_allocator
@quick
@given(curves=some_curves())
def test_the_whole_budget_leaves_everything_dense(divide, curves):
    plan = divide(curves, dense_bytes(curves))
    assert {choice.amount for choice in plan.choices.values()} == {None}
    assert loss(plan, curves) == 0.0
    assert plan.nbytes == plan.dense_bytes


@every_allocator
@quick
@given(curves=some_curves(), keep=st.floats(0.001, 0.999))
def test_a_budget_too_small_is_refused_with_one_that_is_just_enough(divide, curves, keep):
    dense = dense_bytes(curves)
    try:
        divide(curves, int(keep * dense))
    except RecipeError as error:
        named, asked = re.search(r"^(\S+): .*keep at least ([\d.]+)$", str(error)).groups()
        assert named in {curve.site for curve in curves}
        divide(curves, int(float(asked) * dense * (1 + 1e-12)))
        if divide is not uniform:
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
    monkeypatch.setattr(allocate, "STATES", 3)
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
