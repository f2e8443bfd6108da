"""Error feedback with outliers: the threshold rule of the paper in its limits, leaving out as it is defined, exact
counts."""

import pytest
import torch
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kinds import SumLinear
from tersely.kinds.sparse import sparse_bytes
from tersely.linalg.grid import fit_grid, group_size
from tersely.linalg.hessian import feedback
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.outliers import left_out, outlier_count, swept, worth_leaving_out
from tersely.methods.quantize.spqr import SpQR
from tersely.stats import Gram, Stats

every_form = pytest.mark.parametrize("form", ["asymmetric", "symmetric", "symmetric_full"])
every_search = pytest.mark.parametrize("search", ["left_out", "sweep"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """With outliers of its own."""
    return normal(*shape, seed=seed) * (1 + 4 * (normal(*shape, seed=seed + 1) > 2))


def correlated(width: int, tokens: int = 300) -> Tensor:
    loudness = torch.logspace(0.5, -1, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) / width**0.5


def seen(x: Tensor) -> Stats:
    gram = Gram(x.shape[1])
    gram.update(x)
    return Stats({Gram: gram})


# --- the threshold ----------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_threshold_is_gptq(form, act_order, dtype):
    weight, stats = heavy(10, 50).to(dtype), seen(correlated(50))
    for bits in (2, 3, 4):
        twin = GPTQ(group=16, grid=form, act_order=act_order).compress(weight, stats, bits)
        none = SpQR(share=0.0, grid=form, act_order=act_order, scale="float16").compress(weight, stats, bits)
        assert none.spec() == twin.spec()
        assert all(torch.equal(t, twin.state_dict()[name]) for name, t in none.state_dict().items())
        spread = feedback(stats[Gram].mean(), damping=0.01, loudest_first=act_order)
        codes, _, _ = swept(weight.float(), spread, fit_grid(weight, bits, 16, form))
        assert torch.equal(codes, twin.unpacked())


def test_the_share_of_outliers_falls_as_the_threshold_rises():
    weight, found = heavy(24, 64), []
    spread = feedback(seen(correlated(64))[Gram].mean(), damping=0.01, loudest_first=True)
    grid = fit_grid(weight, 3, 16)
    for threshold in (0.0, 0.02, 0.05, 0.1, 0.3, 1.0, float("inf")):
        found.append((swept(weight, spread, grid, threshold=threshold)[2] > threshold).double().mean().item())
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.99 and found[-1] == 0 and len(set(found)) > 4


def test_the_rule_of_the_paper_skips_what_it_finds():
    """Outliers found on the way cause no error: the same sweep with them given from the start."""
    weight = heavy(12, 40)
    spread = feedback(seen(correlated(40))[Gram].mean(), damping=0.01, loudest_first=True)
    grid = fit_grid(weight, 3, 16)
    codes, values, costs = swept(weight, spread, grid, threshold=0.2)
    again, same, _ = swept(weight, spread, grid, costs > 0.2)
    assert (costs > 0.2).any() and torch.equal(codes, again) and torch.equal(values, same)


# --- leaving out ------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("shape", [(3, 20), (2, 16), (4, 7)], ids=str)
def test_leaving_out_is_worth_what_it_is_defined_to_be(shape, form):
    """Against the definition, weight by weight: fit without it, and do not count it."""
    weight, prices = heavy(*shape, seed=3), normal(*shape, seed=4).square()
    worth = worth_leaving_out(weight, prices, 3, 8, form)
    size = group_size(shape[1], 8)
    # one scale format for all: the exponent is that of the whole weight, which the largest of all may set
    whole = fit_grid(weight, 3, 8, form)
    own = (weight - whole.levels(whole.nearest(weight))).square() * prices
    for row in range(shape[0]):
        for column in range(shape[1]):
            without = weight.clone()
            without[row, column] = 0.0
            grid = fit_grid(without, 3, 8, form)
            lost = (without - grid.levels(grid.nearest(without))).square() * prices
            start = column // size * size
            expected = own[row, start : start + size].sum() - lost[row, start : start + size].sum()
            assert worth[row, column].item() == pytest.approx(expected.item(), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 64, 128])
def test_so_many_are_left_out_and_planted_ones_before_all_others(count):
    weight = normal(4, 32)
    weight[1, 3], weight[1, 9], weight[3, 30] = 40.0, 30.0, -50.0  # in a group of 8 each
    outliers, least = left_out(weight, torch.ones(1, 32, dtype=torch.float64), count, 3, 8, "asymmetric")
    assert outliers.sum() == count and least >= 0
    planted = (weight.abs() > 20) & outliers
    assert planted.sum() == min(count, 3)


# --- the method -------------------------------------------------------------------------------------------------------


@every_search
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (17, 31), (6, 130)], ids=str)
@pytest.mark.parametrize("share", [0.01, 0.1])
def test_the_count_and_the_bytes_are_exact_for_every_shape(search, shape, share):
    method, count = SpQR(share=share, search=search, width=3), outlier_count(share, shape)
    made = method.compress(heavy(*shape), seen(correlated(shape[1])), 3)
    assert isinstance(made, SumLinear) and made.terms[1].entries == count
    groups = -(-shape[1] // min(16, shape[1]))
    integers = shape[0] * (-(-3 * shape[1] // 8) + groups + -(-3 * groups // 8))  # codes, scales of a byte, zero points
    assert method.sizes(shape, 4)[1].nbytes == made.nbytes() == integers + sparse_bytes(shape, count)


@every_search
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outliers_lose_less_than_gptq_on_the_same_groups(search, bits):
    weight, stats = heavy(32, 64), seen(correlated(64))
    plain = GPTQ(group=16, width=bits).options(weight, stats)[1].error
    with_some = SpQR(share=0.05, search=search, width=bits, scale="float16").options(weight, stats)[1].error
    assert with_some < 0.6 * plain


def test_a_share_of_one_is_the_weight_of_16_bits():
    weight = heavy(7, 30).to(torch.bfloat16)
    assert torch.equal(SpQR(share=1.0).compress(weight, seen(correlated(30)), 2).to_dense(), weight.float())


@every_search
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_inputs_of_any_scale_are_survived(search, scale):
    made = SpQR(search=search).compress(heavy(6, 40).float(), seen(scale * correlated(40)), 3)
    assert made.to_dense().isfinite().all()


@pytest.mark.parametrize("wrong", [{"share": 2.0}, {"damping": float("inf")}, {"search": "luck"}, {"scale": "e8m0"}])
def test_settings_that_do_not_exist_are_refused(wrong):
    with pytest.raises(RecipeError, match="spqr"):
        SpQR(**wrong)
