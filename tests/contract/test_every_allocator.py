"""Every allocator keeps its budget, and gains from every byte where it knows errors.

What only a model can tell is told twice: not at all, as before a run, and as measured, where the harm that is measured
is the one that is predicted, so that all sums that anyone minimises are one.
"""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest

from contract.material import for_every, normal
from tersely.allocate import ALLOCATORS, UNMEASURED, Allocator, Curve, Measures, Plan, curve_of
from tersely.errors import RecipeError
from tersely.methods.low_rank.svd import PlainSVD
from tersely.option import Option
from tersely.stats import Stats

SHAPES = ((5, 3), (17, 31), (9, 9), (40, 24), (2, 130), (24, 40))

every_allocator = for_every("allocator", ALLOCATORS)
twice = pytest.mark.parametrize("measured", [False, True], ids=["unmeasured", "measured"])


def curves(*, errors: bool = True) -> list[Curve]:
    """Of sites of all shapes, cut by singular values: every step avoids less than the one before."""
    found = []
    for number, shape in enumerate(SHAPES):
        weight = normal(*shape, seed=number)
        options = PlainSVD().options(weight, Stats())
        if not errors:
            options = PlainSVD().sizes(shape, weight.element_size())
        if errors:  # and what the loss does, up or down
            options = [replace(option, drift=(-1) ** option.amount * option.error) for option in options]
        found.append(curve_of(str(shape), options, weight.nbytes, role=f"role.{number % 3}", tokens=100))
    return found


def known(allocator: Allocator) -> list[Curve]:
    """Curves as the allocator gets them."""
    return curves(errors=allocator.needs_errors)


def loss(curve: Curve, option: Option) -> float:
    """Dense bytes · share of the avoidable error that is left."""
    avoidable = curve.options[0].error
    return curve.dense_bytes * option.error / avoidable if avoidable else 0.0


def told(asked: list[Curve], measured: bool) -> Measures:
    if not measured:
        return UNMEASURED
    harm = {
        curve.site: {option.nbytes: loss(curve, option) for option in curve.options if option.error is not None}
        for curve in asked
    }
    return Measures({curve.site: 0.9 - 0.1 * number for number, curve in enumerate(asked)}, harm)


def budgets(asked: list[Curve]) -> list[int]:
    """From one with which every allocator finds a plan, that of the largest share that a site needs."""
    dense = sum(curve.dense_bytes for curve in asked)
    first = int(max(curve.options[0].nbytes / curve.dense_bytes for curve in asked) * dense) + 1
    return [*range(first, dense, max(1, (dense - first) // 40)), dense, dense + 1000]


@every_allocator
@twice
def test_a_plan_names_every_site_once_and_keeps_the_budget(allocator, measured):
    asked = known(allocator)
    offered = {curve.site: {(o.amount, o.nbytes) for o in curve.options} for curve in asked}
    for budget in budgets(asked):
        plan = allocator.divide(asked, budget, told(asked, measured))
        assert list(plan.choices) == [curve.site for curve in asked]
        assert plan.nbytes <= budget == plan.budget
        assert all((choice.amount, choice.nbytes) in offered[site] for site, choice in plan.choices.items())
        assert plan.dense_bytes == sum(curve.dense_bytes for curve in asked)
    assert all(choice.amount is None for choice in plan.choices.values()), "a budget for everything leaves all dense"


@every_allocator
@twice
def test_more_bytes_never_predict_more_error(allocator, measured):
    asked, found = curves(), []
    for budget in budgets(asked):
        plan = allocator.divide(asked, budget, told(asked, measured))
        chosen = [next(o for o in c.options if o.amount == plan.choices[c.site].amount) for c in asked]
        found.append(sum(loss(curve, option) for curve, option in zip(asked, chosen, strict=True)))
    for less, more in pairwise(found):
        assert more <= less * (1 + 1e-9)
    assert found[-1] == 0


@every_allocator
@twice
def test_the_same_curves_give_the_same_plan_and_stay_as_they_are(allocator, measured):
    asked = known(allocator)
    before, budget, measures = copy.deepcopy(asked), budgets(asked)[10], told(asked, measured)
    plan = allocator.divide(asked, budget, measures)
    assert asked == before and measures == told(asked, measured)
    assert allocator.divide(copy.deepcopy(asked), budget, measures) == plan


@every_allocator
def test_a_plan_survives_as_text(allocator):
    asked = known(allocator)
    parts = [Option({"rank": 2, "bits": 4}, 9, *([1.0, 0.5] if allocator.needs_errors else [None]))]
    asked[0] = curve_of("parts", parts, 100, role="parts")
    plan = allocator.divide(asked, budgets(asked)[5])
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@every_allocator
@twice
def test_too_small_a_budget_is_refused(allocator, measured):
    asked = known(allocator)
    smallest = sum(curve.options[0].nbytes for curve in asked)
    for budget in (smallest - 1, 0):
        with pytest.raises(RecipeError, match=r"keep|budget|bytes"):
            allocator.divide(asked, budget, told(asked, measured))


@every_allocator
@twice
def test_one_site_and_sites_without_options_are_no_special_case(allocator, measured):
    asked = known(allocator)[-1:]
    plan = allocator.divide(asked, asked[0].dense_bytes // 2, told(asked, measured))
    assert list(plan.choices) == [asked[0].site]
    stuck = [curve_of("stuck", [], 10)]
    assert allocator.divide(stuck, 10, told(stuck, measured)).choices["stuck"].amount is None
    with pytest.raises(RecipeError):
        allocator.divide(stuck, 9, told(stuck, measured))


@every_allocator
def test_what_is_to_be_measured_are_options_of_the_curve(allocator):
    if allocator.probes is not None:
        for curve in curves():
            probed = list(allocator.probes(curve))
            assert set(map(repr, probed)) <= set(map(repr, curve.options))
            assert all(option.amount is not None for option in probed), "leaving it dense harms nothing"
