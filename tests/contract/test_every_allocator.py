"""Every allocator keeps its budget, and gains from every byte where it knows errors."""

import copy
from itertools import pairwise

import pytest

from contract.material import normal
from tersely.allocate import ALLOCATORS, Allocator, Curve, Plan, curve_of
from tersely.errors import RecipeError
from tersely.methods.low_rank.svd import PlainSVD
from tersely.option import Option
from tersely.stats import Stats

SHAPES = ((5, 3), (17, 31), (9, 9), (40, 24), (2, 130))

every_allocator = pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=ALLOCATORS)


def curves(*, errors: bool = True) -> list[Curve]:
    """Of sites of all shapes, cut by singular values: every step avoids less than the one before."""
    found = []
    for number, shape in enumerate(SHAPES):
        weight = normal(*shape, seed=number)
        options = PlainSVD().options(weight, Stats())
        if not errors:
            options = PlainSVD().sizes(shape, weight.element_size())
        found.append(curve_of(str(shape), options, weight.nbytes))
    return found


def known(allocator: Allocator) -> list[Curve]:
    """Curves as the allocator gets them."""
    return curves(errors=allocator.needs_errors)


def least(asked: list[Curve]) -> int:
    """Bytes with which every allocator finds a plan: the smallest share that all sites have."""
    share = max(curve.options[0].nbytes / curve.dense_bytes for curve in asked)
    return int(share * sum(curve.dense_bytes for curve in asked)) + 1


def budgets(asked: list[Curve]) -> list[int]:
    dense = sum(curve.dense_bytes for curve in asked)
    first = least(asked)
    return [*range(first, dense, max(1, (dense - first) // 40)), dense, dense + 1000]


def lost(plan: Plan, asked: list[Curve]) -> float:
    """Σ dense bytes · share of the avoidable error that is left: what is to fall."""
    total = 0.0
    for curve in asked:
        (option,) = (o for o in curve.options if o.amount == plan.choices[curve.site].amount)
        total += curve.dense_bytes * option.error / curve.options[0].error if curve.options[0].error else 0.0
    return total


@every_allocator
def test_a_plan_names_every_site_once_and_keeps_the_budget(allocator):
    asked = known(allocator)
    offered = {curve.site: {(o.amount, o.nbytes) for o in curve.options} for curve in asked}
    for budget in budgets(asked):
        plan = allocator.divide(asked, budget)
        assert list(plan.choices) == [curve.site for curve in asked]
        assert plan.nbytes <= budget == plan.budget
        assert all((choice.amount, choice.nbytes) in offered[site] for site, choice in plan.choices.items())
        assert plan.dense_bytes == sum(curve.dense_bytes for curve in asked)
    assert all(choice.amount is None for choice in plan.choices.values()), "a budget for everything leaves all dense"


@every_allocator
def test_more_bytes_never_predict_more_error(allocator):
    asked = curves()
    found = [lost(allocator.divide(asked, budget), asked) for budget in budgets(asked)]
    for less, more in pairwise(found):
        assert more <= less * (1 + 1e-9)
    assert found[-1] == 0


@every_allocator
def test_the_same_curves_give_the_same_plan_and_stay_as_they_are(allocator):
    asked = known(allocator)
    before, budget = copy.deepcopy(asked), budgets(asked)[10]
    plan = allocator.divide(asked, budget)
    assert asked == before
    assert allocator.divide(copy.deepcopy(asked), budget) == plan


@every_allocator
def test_a_plan_survives_as_text(allocator):
    asked = known(allocator)
    asked[0] = curve_of("parts", [Option({"rank": 2, "bits": 4}, 9, 1.0 if allocator.needs_errors else None)], 100)
    plan = allocator.divide(asked, budgets(asked)[5])
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@every_allocator
def test_too_small_a_budget_is_refused(allocator):
    asked = known(allocator)
    smallest = sum(curve.options[0].nbytes for curve in asked)
    for budget in (smallest - 1, 0):
        with pytest.raises(RecipeError, match=r"keep|budget|bytes"):
            allocator.divide(asked, budget)


@every_allocator
def test_one_site_and_sites_without_options_are_no_special_case(allocator):
    asked = known(allocator)[-2:-1]
    plan = allocator.divide(asked, asked[0].dense_bytes // 2)
    assert list(plan.choices) == [asked[0].site]
    stuck = curve_of("stuck", [], 10)
    plan = allocator.divide([stuck], 10)
    assert plan.choices["stuck"].amount is None
    with pytest.raises(RecipeError):
        allocator.divide([stuck], 9)
