"""The grain of a weight is as fine as its outliers ask for, found from the weight alone."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.allocate import ALLOCATORS, curve_of
from tersely.errors import RecipeError
from tersely.kinds.quantized import quantized_bytes
from tersely.methods.quantize.finequant import FineQuant
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.stats import Stats

quick = settings(max_examples=40, deadline=None, database=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_outliers(rows: int, columns: int, seed: int = 0) -> Tensor:
    """One large entry in every row."""
    weight = normal(rows, columns, seed=seed)
    places = torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(seed + 1))
    weight[torch.arange(rows), places] = 40.0
    return weight


def lost(weight: Tensor, bits: int, group: int) -> float:
    made = FineQuant().compress(weight, Stats(), {"bits": bits, "group": group})
    return (weight - made.to_dense()).square().sum().item()


@pytest.mark.parametrize("columns", [512, 1024, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_gaussian_rows_keep_a_coarse_grain_and_outliers_get_a_fine_one(columns, seed):
    method = FineQuant()
    assert method.grain(normal(64, columns, seed=seed)) == 0
    assert method.grain(with_outliers(64, columns, seed=seed)) == 64


def test_halving_gaussian_groups_shrinks_their_ranges_by_what_theory_says():
    """E max of g numbers grows like √(2 ln g): 4 to 8 % a halving, which is why alpha lies above."""
    weight = normal(256, 4096).abs()
    ranges = [weight.view(256, -1, group).amax(-1).mean().item() for group in (4096, 2048, 1024, 512, 256, 128, 64)]
    shrunk = [1 - fine / coarse for coarse, fine in pairwise(ranges)]
    assert all(0.03 < share < FineQuant().alpha for share in shrunk)


@quick
@given(columns=st.integers(1, 700), least=st.integers(1, 90))
def test_groups_divide_each_other_and_reach_from_rows_to_the_least(columns, least):
    whole, *finer = FineQuant(least=least).groups(columns)
    assert whole == 0 and finer == sorted(finer, reverse=True)
    assert all(coarse == 2 * fine for coarse, fine in pairwise(finer))
    assert (finer[-1] == least and columns // 4 < finer[0] <= columns // 2) if finer else columns < 2 * least


@pytest.mark.parametrize("shape", [(6, 130), (5, 300), (3, 64), (4, 1000)], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_bytes_are_those_of_codes_and_scales_for_every_grain(shape, bits):
    method = FineQuant(width=bits)
    assert len(method.sizes(shape, 2)) == 1 + len(method.groups(shape[1]))
    for option in method.sizes(shape, 2)[1:]:
        group = option.amount["group"]
        groups = 1 if group == 0 else math.ceil(shape[1] / group)
        assert option.nbytes == shape[0] * (math.ceil(shape[1] * bits / 8) + 2 * groups)
        assert method.compress(normal(*shape), Stats(), option.amount).nbytes() == option.nbytes


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grain_is_round_to_nearest_on_symmetric_groups(bits):
    weight = with_outliers(9, 300)
    for group in (0, 64, 128):
        made = FineQuant().compress(weight, Stats(), {"bits": bits, "group": group})
        twin = RoundToNearest(group=group, grid="symmetric").compress(weight, Stats(), bits)
        assert torch.equal(made.to_dense(), twin.to_dense())


@pytest.mark.parametrize("make", [normal, with_outliers])
def test_finer_groups_never_lose_more_on_the_whole(make):
    weight = make(128, 1024)
    errors = [lost(weight, 4, group) for group in FineQuant().groups(1024)]
    assert errors == sorted(errors, reverse=True)


def test_what_is_finer_than_the_rule_is_not_credited():
    method, weight = FineQuant(width=4), normal(64, 512)
    options = {o.amount["group"]: o for o in method.options(weight, Stats())[1:]}
    assert {options[group].error for group in (64, 128, 256)} == {options[0].error}
    assert options[0].error == pytest.approx(lost(weight, 4, 0))
    curve = curve_of("site", method.options(weight, Stats()), weight.nbytes)
    assert [o.amount for o in curve.options] == [{"bits": 4, "group": 0}, None]


def test_a_generous_budget_gives_every_weight_its_own_grain():
    """Only the weight with outliers gets small groups; the bytes left over stay unspent."""
    method = FineQuant(width=4)
    weights = {str(seed): normal(64, 512, seed=seed) for seed in range(4)} | {"planted": with_outliers(64, 512)}
    curves = [curve_of(n, method.options(w, Stats()), 2 * w.numel()) for n, w in weights.items()]
    budget = sum(quantized_bytes((64, 512), 4, 64, zeros=False) for _ in weights)
    plan = ALLOCATORS["greedy"].divide(curves, budget)
    chosen = {site: choice.amount["group"] for site, choice in plan.choices.items()}
    assert chosen == dict.fromkeys("0123", 0) | {"planted": 64}
    assert plan.nbytes < budget


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_are_rows_and_the_least_group(alpha):
    for weight in (normal(8, 512), with_outliers(8, 512)):
        assert FineQuant(alpha=alpha).grain(weight) == (0 if alpha else 64)
    assert FineQuant(alpha=alpha).grain(torch.zeros(3, 512)) == 0


@pytest.mark.parametrize("power", [-30, 30])
def test_the_unit_of_a_weight_does_not_matter(power):
    weight = with_outliers(8, 300)
    assert FineQuant().grain(weight * 2.0**power) == FineQuant().grain(weight)


@pytest.mark.parametrize("wrong", [{"width": 2}, {"alpha": -0.1}, {"alpha": 1.1}, {"least": 0}], ids=str)
def test_settings_that_do_not_exist_are_refused(wrong):
    with pytest.raises(RecipeError, match="wanted"):
        FineQuant(**wrong)


@pytest.mark.parametrize("amount", [4, {"bits": 4}, {"bits": 5, "group": 0}, {"bits": 4, "group": 48}], ids=str)
def test_amounts_that_are_not_offered_are_refused(amount):
    with pytest.raises(RecipeError, match="finequant: amount"):
        FineQuant().compress(normal(4, 300), Stats(), amount)
