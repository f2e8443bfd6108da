"""Every option of the union predicts what its module does, and an exact allocator gains from having more of them."""

import math

import pytest
import torch
from torch import Tensor

from tersely.allocate import curve_of, knapsack
from tersely.errors import RecipeError
from tersely.kinds import Made
from tersely.kinds.quantized import QuantizedLinear
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.methods.mixed import BRANCH_ROUNDS, Mixed
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.qera import QERA
from tersely.stats import AbsMean, Gram, Stats


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(out: int, columns: int, *, seed: int = 0, dtype=torch.float32, tokens: int = 200) -> tuple[Tensor, Stats]:
    """A weight with a falling spectrum, and statistics of correlated inputs."""
    weight = torch.randn(out, columns, generator=draw(seed), dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    falling = values * 0.8 ** torch.arange(len(values))
    mixing = torch.randn(columns, columns, generator=draw(seed + 1), dtype=torch.float64)
    stats = Stats({Gram: Gram(columns), AbsMean: AbsMean(columns)})
    stats.update(torch.randn(tokens, columns, generator=draw(seed + 2), dtype=torch.float64) @ mixing)
    return ((left * falling) @ right).to(dtype), stats


def measured(weight: Tensor, stats: Stats, module) -> float:
    lost = weight.double() - module.to_dense().double()
    return ((lost @ stats[Gram].mean()) * lost).sum().item()


def weight_bytes(module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def small(**settings) -> Mixed:
    return Mixed(**({"widths": (2, 4), "group": 8, "groups": (4, 8), "ranks": 4, "branches": (1.5,)} | settings))


PLAIN = {"group": 8, "groups": (8,), "branches": (), "scale": "float16", "shrink": False, "widths": (2, 3, 4, 8)}
"""What methods do where nothing else is asked of them."""


every_case = pytest.mark.parametrize(
    ("out", "columns", "dtype"),
    [(24, 24, torch.float32), (40, 16, torch.float64), (13, 37, torch.bfloat16), (9, 7, torch.float16)],
    ids=str,
)


@every_case
@pytest.mark.parametrize(
    "settings",
    [{}, {"quantize": "rtn"}, {"quantize": "sinq"}, {"quantize": "hqq"}, {"low_rank": "svd"}, {"low_rank": "asvd"}],
    ids=str,
)
def test_every_option_predicts_the_error_and_the_bytes_of_its_module(out, columns, dtype, settings):
    weight, stats = case(out, columns, dtype=dtype)
    method = small(**settings)
    before = weight.clone()
    whole, *options = method.options(weight, stats)
    assert (whole.amount, whole.nbytes) == (0, 0)
    dense = weight.double()
    assert whole.error == pytest.approx(((dense @ stats[Gram].mean()) * dense).sum().item())
    assert [o.nbytes for o in options] == sorted(o.nbytes for o in options)
    for option in options:
        module = method.compress(weight, stats, option.amount)
        assert option.error == pytest.approx(measured(weight, stats, module), rel=1e-4, abs=1e-9 * whole.error)
        assert option.nbytes == weight_bytes(module) == module.nbytes()
        assert module.weight.dtype == dtype
    assert torch.equal(weight, before)


def test_sizes_are_the_options_without_errors():
    weight, stats = case(24, 16)
    method = small()
    plain = method.sizes((24, 16), weight.element_size())
    offered = method.options(weight, stats)
    assert [(o.amount, o.nbytes) for o in plain] == [(o.amount, o.nbytes) for o in offered]
    assert {o.error for o in plain} == {None}
    amounts = [repr(o.amount) for o in plain]
    assert len(set(amounts)) == len(amounts)


def test_what_each_method_alone_offers_is_offered():
    weight, stats = case(32, 32)
    offered = {repr(o.amount): o for o in Mixed(**PLAIN).options(weight, stats)}
    for option in GPTQ(group=8).options(weight, stats)[1:]:
        ours = offered[repr({"bits": option.amount, "group": 8})]
        assert ours.nbytes == option.nbytes
        assert ours.error == pytest.approx(option.error, rel=1e-4)
    ranks = {o.amount: o for o in WhitenedSVD().options(weight, stats)}
    same = [o for o in offered.values() if isinstance(o.amount, dict) and o.amount.keys() == {"rank"}]
    assert {o.amount["rank"] for o in same} == {math.ceil(15 * place**2 / 16**2) for place in range(1, 17)}
    for ours in same:
        assert ours.nbytes == ranks[ours.amount["rank"]].nbytes
        assert ours.error == pytest.approx(ranks[ours.amount["rank"]].error, rel=1e-3)


def test_only_ranks_that_pay_are_offered():
    method = Mixed(ranks=100)
    for shape in [(24, 24), (40, 16), (1, 9), (2, 3), (129, 64)]:
        options = method.sizes(shape, 2)
        ranks = {o.amount["rank"] for o in options[1:] if "rank" in o.amount}
        assert ranks == {r for r in range(1, min(shape) + 1) if r * sum(shape) < shape[0] * shape[1]}


def test_both_factors_are_quantized_and_nest():
    weight, stats = case(24, 24)
    module = small().compress(weight, stats, {"rank": 5, "bits": 4})
    assert isinstance(module.up, QuantizedLinear) and isinstance(module.down, QuantizedLinear)
    assert module.down.bits == module.up.bits == 4
    module.set_bias(torch.arange(24.0))
    x = torch.randn(3, 24, generator=draw(9))
    wanted = x @ module.to_dense().T + torch.arange(24.0)
    assert torch.allclose(module(x), wanted, atol=1e-4)
    made = Made.of(module)
    again = made.build()
    again.load_state_dict(made.state, assign=True)
    assert torch.equal(again(x), module(x))


def test_more_bits_and_more_rank_lose_less():
    weight, stats = case(32, 24)
    found = {tuple(sorted(o.amount.items())): o.error for o in Mixed(**PLAIN | {"ranks": 5}).options(weight, stats)[1:]}
    ranks = sorted({dict(amount)["rank"] for amount in found if "rank" in dict(amount)})
    for rank in ranks:
        by_width = [found[("bits", width), ("rank", rank)] for width in (2, 3, 4, 8)]
        assert by_width == sorted(by_width, reverse=True)
        assert by_width[-1] >= found[(("rank", rank),)] * (1 - 1e-6)
    by_rank = [found[("bits", 8), ("rank", rank)] for rank in ranks]
    assert by_rank == sorted(by_rank, reverse=True)


def test_silent_inputs_count_alike():
    weight, _ = case(16, 12)
    silent = Stats({Gram: Gram(12)})
    silent.update(torch.zeros(5, 12))
    method = small()
    whole, *options = method.options(weight, silent)
    assert whole.error == pytest.approx(weight.double().square().sum().item())
    for option in options:
        lost = weight.double() - method.compress(weight, silent, option.amount).to_dense().double()
        assert option.error == pytest.approx(lost.square().sum().item(), rel=1e-4, abs=1e-9 * whole.error)


def test_few_tokens_and_zero_weights_do():
    weight, stats = case(16, 24, tokens=5)
    for option in small().options(weight, stats)[1:]:
        made = small().compress(weight, stats, option.amount)
        assert option.error == pytest.approx(measured(weight, stats, made), rel=1e-3, abs=1e-3)
    zero = torch.zeros(8, 8)
    _, stats = case(8, 8)
    assert {o.error for o in small().options(zero, stats)} == {0.0}


def test_an_exact_division_gains_from_more_options():
    """Each family alone, and their union; the smallest option is shared, so that all are measured by one yardstick."""
    cases = [case(40, 40), case(40, 24, seed=20), case(24, 40, seed=30)]
    method = small(ranks=5, group=8)
    offered = [method.options(weight, stats) for weight, stats in cases]
    families = {
        "all": lambda amount: True,
        "ranks": lambda amount: amount.keys() == {"rank"},
        "bits": lambda amount: amount.keys() == {"bits", "group"},
        "both": lambda amount: amount.keys() == {"rank", "bits"},
        "branches": lambda amount: "branch" in amount,
    }
    for keep in (0.15, 0.25, 0.4):
        losses = {}
        for family, member in families.items():
            curves = []
            for number, ((weight, _), options) in enumerate(zip(cases, offered, strict=True)):
                whole, *rest = options
                least = min(rest, key=lambda o: o.nbytes)
                kept = [o for o in rest if o is least or member(o.amount)]
                curves.append(curve_of(f"site.{number}", [whole, *kept], weight.numel() * weight.element_size()))
            budget = int(keep * sum(curve.dense_bytes for curve in curves))
            plan = knapsack(curves, budget)
            assert plan.nbytes <= budget
            weighted = [
                curve.dense_bytes * plan.choices[curve.site].relative_error * curve.energy / curve.options[0].error
                for curve in curves
            ]
            losses[family] = sum(weighted)
        assert all(losses["all"] <= alone * (1 + 1e-9) for alone in losses.values())
        assert losses["all"] < losses["ranks"]


def test_a_branch_takes_the_bytes_it_may_and_is_what_qera_makes():
    weight, stats = case(40, 40)
    method = small(branches=(0.75, 1.5, 1.51), widths=(2,))
    found = [o for o in method.options(weight, stats) if o.amount and "branch" in o.amount]
    alone = next(o for o in method.options(weight, stats) if o.amount == {"bits": 2, "group": 8})
    assert len(found) == 2
    for option, bits in zip(found, (0.75, 1.5), strict=True):
        assert 0 < option.nbytes - alone.nbytes <= bits * 40 * 40 / 8
        assert option.error <= alone.error
        alike = QERA(group=8, rounds=BRANCH_ROUNDS)
        made = alike.compress(weight, stats, {"bits": 2, "rank": option.amount["branch"]})
        assert measured(weight, stats, made) == pytest.approx(option.error)
        assert made.nbytes() == option.nbytes


def test_groups_that_are_the_same_are_offered_once():
    offered = [o.amount for o in small(groups=(4, 16, 64, 0), ranks=0, branches=()).sizes((20, 12), 2)[1:]]
    assert sorted(a["group"] for a in offered if a["bits"] == 2) == [0, 4]
    made = small(groups=(4, 16), ranks=0).compress(*case(8, 12), {"bits": 2, "group": 16})
    assert made.grid().scales.raw.shape == (8, 1)


def test_smaller_groups_lie_between_the_widths():
    weight, stats = case(40, 64)
    found = small(ranks=0, branches=(), widths=(2, 3), groups=(16, 32, 64)).options(weight, stats)[1:]
    assert [(o.amount["bits"], o.amount["group"]) for o in found] == [(b, g) for b in (2, 3) for g in (64, 32, 16)]
    by_group = {o.amount["group"]: o.error for o in found if o.amount["bits"] == 2}
    assert by_group[16] < by_group[32] < by_group[64]


@pytest.mark.parametrize(
    "amount",
    [0, 3, None, {}, {"rank": 0}, {"rank": 12}, {"bits": 3}, {"bits": 2}, {"rank": 2, "group": 4},
     {"bits": 2, "group": 5}, {"bits": 3, "group": 8}, {"bits": 2, "group": 4, "branch": 6},
     {"bits": 2, "group": 8, "branch": 3}, {"bits": 4, "group": 8, "branch": 6}, {"rank": 2, "branch": 6}],
    ids=str,
)  # fmt: skip
def test_other_amounts_are_refused(amount):
    weight, stats = case(24, 24)
    with pytest.raises(RecipeError, match="wanted a rank up to 11, bits out of"):
        small().compress(weight, stats, amount)


@pytest.mark.parametrize(
    "settings",
    [{"low_rank": "svdllm"}, {"quantize": "awq"}, {"widths": ()}, {"widths": (4, 4)}, {"widths": (9,)}, {"ranks": -1},
     {"group": -1}, {"groups": ()}, {"groups": (8, 8)}, {"groups": (-1,)}, {"branches": (0,)}, {"branches": (9,)},
     {"factor_width": 1}, {"scale": "float8"}],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused(settings):
    with pytest.raises(RecipeError):
        Mixed(**settings)
