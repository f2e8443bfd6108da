"""QERA: the branch is the best there is for the integers it stands beside, and never a loss.

W is a weight, Q its integers, U V the branch, G the Gram matrix of the inputs, L = tr((W - W') G (W - W')ᵀ).
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract.material import correlated, normal, observed, weight_bytes
from tersely.errors import RecipeError
from tersely.kinds import LinearKind, SumLinear
from tersely.kinds.quantized import QuantizedLinear
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.hqq import HalfQuadratic
from tersely.methods.quantize.qera import QERA, branch_bytes
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.methods.quantize.sinq import SinkhornNormalized
from tersely.stats import Gram, Stats

GROUP = 8
FLOATS = {"group": GROUP, "factor_width": None, "rounds": 0}
"""The paper's; factors in the dtype of the weight, float64 here, so that identities hold."""

every_quantizer = pytest.mark.parametrize("quantize", ["gptq", "hqq", "rtn", "sinq"])
every_metric = pytest.mark.parametrize("metric", ["gram", "channels", "none"])


def case(
    out: int = 24, columns: int = 22, dtype: torch.dtype = torch.float64, tokens: int = 200
) -> tuple[Tensor, Stats]:
    return normal(out, columns, seed=3, dtype=dtype), observed([Gram], correlated(columns, tokens))


def energy(off: Tensor, metric: Tensor) -> float:
    return ((off @ metric) * off).sum().item()


def lost(weight: Tensor, stats: Stats, module: LinearKind) -> float:
    return energy(weight.double() - module.to_dense().double(), stats[Gram].mean())


def of(method: QERA, weight: Tensor, stats: Stats, rank: int, bits: int = 2) -> LinearKind:
    return method.compress(weight, stats, {"bits": bits, "rank": rank})


# --- what the branch does ---------------------------------------------------------------------------------------------


@every_metric
@pytest.mark.parametrize("shape", [(24, 22), (12, 30), (30, 12)], ids=str)
def test_what_is_left_is_the_energy_of_the_dropped_directions(shape, metric):
    """In the metric that the branch minimises, whose root is taken here and nowhere else."""
    weight, stats = case(*shape)
    gram = stats[Gram].mean()
    minimised = {"gram": gram, "channels": gram.diagonal().diag(), "none": torch.eye(shape[1]).double()}[metric]
    values, vectors = torch.linalg.eigh(minimised)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    method = QERA(metric=metric, **FLOATS)
    off = weight - of(method, weight, stats, 0).to_dense().double()
    dropped = torch.linalg.svdvals(off @ root).square()
    for rank in (1, 3, 8):
        left = weight - of(method, weight, stats, rank).to_dense().double()
        assert energy(left, minimised) == pytest.approx(dropped[rank:].sum().item(), rel=1e-5)


def test_no_other_branch_of_that_rank_does_better():
    weight, stats = case()
    method, gram = QERA(**FLOATS), stats[Gram].mean()
    made = of(method, weight, stats, 3)
    off = weight - made.terms[0].to_dense().double()
    up, down = (getattr(made.terms[1], name).weight.detach() for name in ("up", "down"))
    least = energy(off - up @ down, gram)
    for seed in range(10):
        moved = (up + 1e-2 * normal(*up.shape, seed=seed)) @ (down + 1e-2 * normal(*down.shape, seed=50 + seed))
        assert energy(off - moved, gram) > least
    for other in ("channels", "none"):
        assert lost(weight, stats, of(QERA(metric=other, **FLOATS), weight, stats, 3)) > least


@every_metric
@pytest.mark.parametrize("tokens", [200, 5], ids=["full rank", "few tokens"])
def test_full_rank_is_the_weight(metric, tokens):
    weight, stats = case(tokens=tokens)
    made = of(QERA(metric=metric, **FLOATS), weight, stats, 22)
    torch.testing.assert_close(made.to_dense().double(), weight, rtol=0, atol=1e-6 * weight.abs().max().item())


@every_quantizer
@pytest.mark.parametrize("bits", [2, 4])
def test_without_rank_it_is_the_quantizer_bit_for_bit(quantize, bits):
    weight, stats = case(dtype=torch.float32)
    alone = {
        "gptq": GPTQ(group=GROUP, shrink=bits <= 3),
        "hqq": HalfQuadratic(group=GROUP),
        "rtn": RoundToNearest(group=GROUP, shrink=bits <= 3),
        "sinq": SinkhornNormalized(group=GROUP, feedback=True),
    }[quantize].compress(weight, stats, bits)
    made = of(QERA(quantize=quantize, group=GROUP, scale="float16"), weight, stats, 0, bits)
    assert isinstance(made, QuantizedLinear) and made.spec() == alone.spec()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name])


@every_quantizer
def test_the_integers_beside_a_branch_are_those_of_the_quantizer(quantize):
    weight, stats = case(dtype=torch.float32)
    method = QERA(quantize=quantize, group=GROUP, rounds=0)
    made = of(method, weight, stats, 2)
    assert isinstance(made, SumLinear)
    assert torch.equal(made.terms[0].to_dense(), of(method, weight, stats, 0).to_dense())


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["gptq", "hqq", "rtn", "sinq"]),
    st.sampled_from(["gram", "channels", "none"]),
    st.sampled_from([None, 2, 3, 4, 8]),
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(0, 3),
)
def test_a_branch_is_never_worse_than_none(quantize, metric, factor_width, rank, bits, seed):
    stats = observed([Gram], correlated(9))
    weight = normal(11, 9, seed=seed, dtype=torch.float32)
    method = QERA(quantize=quantize, metric=metric, factor_width=factor_width, group=4)
    alone, with_branch = (lost(weight, stats, of(method, weight, stats, r, bits)) for r in (0, rank))
    assert with_branch <= alone * (1 + 1e-5)


@pytest.mark.parametrize("metric", ["gram", "channels"])
def test_more_rounds_are_never_worse_and_sometimes_better(metric):
    weight, stats = case(dtype=torch.float32)
    found = [lost(weight, stats, of(QERA(group=GROUP, metric=metric, rounds=n), weight, stats, 3)) for n in range(4)]
    assert all(more <= less * (1 + 1e-6) for less, more in itertools.pairwise(found))
    if metric == "gram":
        assert found[-1] < found[0]


def test_more_rank_loses_less():
    weight, stats = case()
    for width in (None, 8):
        found = [
            lost(weight, stats, of(QERA(group=GROUP, factor_width=width, rounds=0), weight, stats, r))
            for r in range(12)
        ]
        assert found == sorted(found, reverse=True)


def test_wider_factors_lose_less_and_eight_bits_lose_next_to_nothing():
    weight, stats = case()
    found = [
        lost(weight, stats, of(QERA(group=GROUP, factor_width=width, rounds=0), weight, stats, 4))
        for width in (2, 4, 8, None)
    ]
    assert found == sorted(found, reverse=True)
    assert found[2] < 1.005 * found[3]


# --- what it takes and what it stores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 22), (5, 40), (40, 5)], ids=str)
@pytest.mark.parametrize("factor_width", [None, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_and_errors_are_those_of_the_module(shape, factor_width, dtype):
    weight, stats = case(*shape, dtype=dtype)
    method = QERA(group=GROUP, factor_width=factor_width, rounds=1)
    whole, *options = method.options(weight, stats)
    assert whole.error == pytest.approx(energy(weight.double(), stats[Gram].mean()))
    for option in options:
        if option.amount["bits"] not in (2, 8):
            continue
        made = method.compress(weight, stats, option.amount)
        assert option.nbytes == made.nbytes() == weight_bytes(made)
        assert option.error == pytest.approx(lost(weight, stats, made), rel=1e-6, abs=1e-9 * whole.error)
        assert made.weight.dtype == dtype


def test_bytes_of_a_branch():
    assert branch_bytes((128, 64), 0, 8, 2) == 0
    assert branch_bytes((128, 64), 4, None, 2) == 2 * 4 * (128 + 64)
    assert branch_bytes((128, 64), 4, 8, 2) == 128 * (4 + 1) + 4 * (64 + 1)
    assert branch_bytes((128, 64), 4, 4, 2) == 128 * (2 + 1) + 4 * (32 + 1)


def test_the_ladder_ends_where_bits_would_do_more():
    for shape in [(128, 128), (5, 7), (1024, 256), (1, 9)]:
        for width in (None, 8):
            options = QERA(width=3, factor_width=width).sizes(shape, 2)[1:]
            ranks = [o.amount["rank"] for o in options]
            assert ranks[0] == 0 and ranks[1:] == [2**i for i in range(len(ranks) - 1)]
            assert all(rank <= min(shape) for rank in ranks)
            assert options[-1].nbytes - options[0].nbytes <= 2 * shape[0] * shape[1] / 8
    assert [o.amount for o in QERA(width=3, rank=7).sizes((128, 128), 2)[1:]] == [{"bits": 3, "rank": 7}]
    assert [o.amount for o in QERA(width=3, rank=7).sizes((128, 5), 2)[1:]] == [{"bits": 3, "rank": 5}]


def test_what_cannot_be_said_of_inputs_or_weights_is_survived():
    weight = normal(10, 12, seed=1, dtype=torch.float32)
    for x in (torch.zeros(4, 12), correlated(12, 1), correlated(12) * 1e-30, correlated(12) * 1e30):
        stats = observed([Gram], x)
        for kept in (weight, torch.zeros_like(weight), weight[:, :1] @ weight[:1]):
            made = of(QERA(group=4), kept, stats, 3)
            assert made.to_dense().isfinite().all()
            assert lost(kept, stats, made) <= lost(kept, stats, of(QERA(group=4), kept, stats, 0)) * (1 + 1e-5)


@pytest.mark.parametrize(
    "amount",
    [0, None, 3, {"bits": 3}, {"rank": 2}, {"bits": 9, "rank": 1}, {"bits": 3, "rank": 23}, {"bits": 3, "rank": -1}],
)
def test_other_amounts_are_refused(amount):
    weight, stats = case()
    with pytest.raises(RecipeError, match="wanted bits, 1 to 8, and a rank up to 22"):
        QERA().compress(weight, stats, amount)
    with pytest.raises(RecipeError, match="wanted bits, 4, and"):
        QERA(width=4).compress(weight, stats, {"bits": 3, "rank": 1})


@pytest.mark.parametrize(
    "wrong",
    [{"quantize": "awq"}, {"metric": "hessian"}, {"rank": -1}, {"factor_width": 1}, {"factor_width": 16},
     {"rounds": -1}, {"width": 9}, {"group": -1}],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(RecipeError):
        QERA(**wrong)
