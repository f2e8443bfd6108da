"""Nesting: what each stage takes, what is left, and where the result lies between whitening and plain SVD.

W is the weight, G the mean of x xᵀ, k₁ and k₂ the ranks of the two stages, E = W - W₁ what stage one leaves.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LowRankLinear
from tersely.methods.low_rank.nsvd import NSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.stats import Gram, Stats

SHAPES = {"wide": (20, 34), "tall": (34, 20), "square": (24, 24)}
SHARES = (0.95, 0.8, 0.5, 0.1)

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_share = pytest.mark.parametrize("share", SHARES)
every_second = pytest.mark.parametrize("second", ["svd", "id"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 300, seed: int = 1) -> Tensor:
    """Inputs of which some channels are loud and all are mixed."""
    loudness = torch.logspace(0.5, -1.5, width, dtype=torch.float64)
    return normal(tokens, width, seed=seed) * loudness @ normal(width, width, seed=seed + 1) * loudness.flip(0).sqrt()


def observed(x: Tensor) -> Stats:
    stats = Stats({Gram: Gram(x.shape[1])})
    stats.update(x)
    return stats


def case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Stats]:
    x = correlated(shape[1])
    return normal(*shape), x, observed(x)


def lost(weight: Tensor, other: Tensor, x: Tensor) -> float:
    """Mean over tokens of ‖(W - W')x‖²."""
    return (x @ (weight - other).T).square().sum(-1).mean().item()


def close(first: Tensor, second: Tensor, tolerance: float = 1e-9) -> bool:
    return torch.linalg.norm(first - second).item() <= tolerance * torch.linalg.norm(second).item()


def stages(weight: Tensor, stats: Stats, method: NSVD, rank: int) -> tuple[int, int, Tensor, Tensor]:
    """k₁, k₂, W₁ and E."""
    first = min(round(method.share * rank), rank - 1)
    one = torch.zeros_like(weight)
    if first:
        one = WhitenedSVD(method.damping).compress(weight, stats, first).to_dense()
    return first, rank - first, one, weight - one


def undamped(share: float, second: str) -> NSVD:
    return NSVD(share=share, second=second, damping=0.0)


# --- the two stages ---------------------------------------------------------------------------------------------------


@every_shape
@every_share
@every_second
def test_the_second_stage_is_orthogonal_to_the_first(shape, share, second):
    weight, _, stats = case(shape)
    method = undamped(share, second)
    for rank in range(2, min(shape)):
        _, _, one, residual = stages(weight, stats, method, rank)
        two = method.compress(weight, stats, rank).to_dense() - one
        for other in (residual, two):
            assert (one.T @ other).abs().max() <= 1e-9 * weight.square().sum()


@every_shape
@every_share
def test_the_second_stage_is_the_best_correction_of_its_rank(shape, share):
    weight, _, stats = case(shape)
    method = undamped(share, "svd")
    for rank in range(1, min(shape)):
        _, of_two, one, residual = stages(weight, stats, method, rank)
        u, s, vt = torch.linalg.svd(residual, full_matrices=False)
        two = method.compress(weight, stats, rank).to_dense() - one
        assert close(two, u[:, :of_two] * s[:of_two] @ vt[:of_two], 1e-7)


@every_shape
@every_share
def test_an_interpolation_keeps_as_many_columns_as_it_has_ranks(shape, share):
    """And misses no more than its bound, √(1 + k₂ (n - k₂)) times what the best of its rank misses."""
    weight, _, stats = case(shape)
    method = undamped(share, "id")
    for rank in range(1, min(shape)):
        _, of_two, _, residual = stages(weight, stats, method, rank)
        left = weight - method.compress(weight, stats, rank).to_dense()
        kept = left.norm(dim=0) <= 1e-9 * weight.norm(dim=0)
        assert kept.sum() >= of_two
        singular = torch.linalg.svdvals(residual)
        factor = math.sqrt(1 + of_two * (shape[1] - of_two))
        assert torch.linalg.matrix_norm(left, 2) <= factor * singular[of_two] * (1 + 1e-9)
        assert left.norm() >= singular[of_two:].norm() * (1 - 1e-9)


def test_the_first_column_of_an_interpolation_is_the_largest_that_is_left():
    weight, _, stats = case((20, 34))
    _, _, _, residual = stages(weight, stats, undamped(0.95, "id"), 10)
    left = weight - undamped(0.95, "id").compress(weight, stats, 10).to_dense()
    assert left.norm(dim=0).argmin() == residual.norm(dim=0).argmax()


@every_shape
@every_share
@every_second
def test_the_rank_is_divided_and_stored_as_one(shape, share, second):
    weight, _, stats = case(shape)
    for rank in range(1, min(shape) + 1):
        module = undamped(share, second).compress(weight, stats, rank)
        assert isinstance(module, LowRankLinear)
        assert (module.up.weight.shape, module.down.weight.shape) == ((shape[0], rank), (rank, shape[1]))
        assert module.nbytes() == rank * sum(shape) * 8
        torch.testing.assert_close(module.up.weight.norm(dim=0), module.down.weight.norm(dim=1))


@every_shape
def test_a_share_below_one_gives_the_second_stage_a_rank_at_least(shape):
    weight, x, stats = case(shape)
    for rank in range(2, 10):
        nested = undamped(0.99, "svd").compress(weight, stats, rank).to_dense()
        whitened = WhitenedSVD(0.0).compress(weight, stats, rank).to_dense()
        assert (weight - nested).norm() < (weight - whitened).norm()
        assert lost(weight, nested, x) > lost(weight, whitened, x)


# --- between whitening and plain SVD ----------------------------------------------------------------------------------


@every_shape
def test_a_share_of_one_is_whitening_to_the_bit(shape):
    weight, _, stats = case(shape)
    for damping in (0.0, 1e-6, 0.1):
        nested, whitened = NSVD(share=1.0, damping=damping), WhitenedSVD(damping)
        errors = [[o.error for o in method.options(weight, stats)] for method in (nested, whitened)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-10, abs=1e-12 * errors[0][0])
        for rank in (1, 7, min(shape)):
            ours, theirs = nested.compress(weight, stats, rank), whitened.compress(weight, stats, rank)
            assert torch.equal(ours.up.weight, theirs.up.weight)
            assert torch.equal(ours.down.weight, theirs.down.weight)


@every_shape
def test_a_share_of_nothing_is_plain_svd(shape):
    weight, _, stats = case(shape)
    for rank in range(1, min(shape) + 1):
        ours = NSVD(share=0.0).compress(weight, stats, rank).to_dense()
        assert close(ours, PlainSVD().compress(weight, stats, rank).to_dense())


@every_shape
@every_share
@every_second
def test_in_the_norm_of_the_weight_it_lies_between_plain_and_whitened(shape, share, second):
    weight, _, stats = case(shape)
    for rank in range(2, min(shape)):
        plain, nested, whitened = (
            (weight - method.compress(weight, stats, rank).to_dense()).norm().item()
            for method in (PlainSVD(), undamped(share, second), WhitenedSVD(0.0))
        )
        assert plain <= nested * (1 + 1e-12)
        if second == "svd":  # an interpolation is one admissible correction, not the best
            assert nested < whitened


@every_shape
@every_share
@every_second
def test_on_the_calibration_it_lies_between_whitening_of_all_ranks_and_of_those_of_stage_one(shape, share, second):
    """The upper bound is certain, not merely usual: the whole is a projection that contains stage one."""
    weight, x, stats = case(shape)
    for rank in range(2, min(shape)):
        _, _, one, _ = stages(weight, stats, undamped(share, second), rank)
        least = lost(weight, WhitenedSVD(0.0).compress(weight, stats, rank).to_dense(), x)
        nested = lost(weight, undamped(share, second).compress(weight, stats, rank).to_dense(), x)
        assert least <= nested * (1 + 1e-12) and nested <= lost(weight, one, x) * (1 + 1e-12)


def test_it_protects_what_the_calibration_never_excited():
    """Calibrated on eight of 24 channels; other texts excite the others."""
    weight, x = normal(24, 24), correlated(24)
    here = x * (torch.arange(24) < 8)
    there = x * (torch.arange(24) >= 8)
    stats = observed(here)
    whitened = WhitenedSVD(1e-6).compress(weight, stats, 8).to_dense()
    nested = NSVD(share=0.7).compress(weight, stats, 8).to_dense()
    assert lost(weight, nested, there) < lost(weight, whitened, there)
    assert lost(weight, nested, here) > lost(weight, whitened, here)


# --- what is offered --------------------------------------------------------------------------------------------------


@every_shape
@every_share
@every_second
def test_the_error_of_every_rank_is_the_measured_one(shape, share, second):
    weight, x, stats = case(shape)
    nothing, *options = undamped(share, second).options(weight, stats)
    assert nothing.error == pytest.approx(lost(weight, torch.zeros_like(weight), x), rel=1e-12)
    assert [option.amount for option in options] == list(range(1, min(shape) + 1))
    for option in options:
        made = undamped(share, second).compress(weight, stats, option.amount).to_dense()
        assert lost(weight, made, x) == pytest.approx(option.error, abs=1e-9 * nothing.error)
    assert options[-1].error == 0.0
    assert close(made, weight, 1e-11)


@every_shape
@every_second
def test_damping_bounds_the_error_from_above(shape, second):
    weight, x, stats = case(shape)
    method, power = NSVD(share=0.8, second=second, damping=0.01), stats[Gram].mean().diagonal().mean().item()
    for option in method.options(weight, stats)[1:]:
        made = method.compress(weight, stats, option.amount).to_dense()
        slack = 0.01 * power * (weight - made).square().sum().item()
        assert lost(weight, made, x) + slack == pytest.approx(option.error, abs=1e-7)


@every_shape
@every_second
@pytest.mark.parametrize("seed", range(5))
def test_with_one_rank_in_the_second_stage_more_rank_is_never_worse(shape, second, seed):
    """k₁ + 1 ranks by the metric alone lose no more than k₁ and any other one."""
    x = correlated(shape[1], seed=seed)
    errors = [option.error for option in undamped(0.95, second).options(normal(*shape, seed=seed), observed(x))]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))


@pytest.mark.parametrize("shape", [(140, 150), (150, 140), (400, 130)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_of_a_large_weight_fewer_ranks_are_offered_and_every_rank_can_be_made(shape, count):
    weight, x, stats = case(shape)
    few = NSVD(ranks=count, damping=0.0)
    _, *sizes = few.sizes(shape, 8)
    assert len(sizes) == count
    assert sizes[-1].nbytes < weight.nbytes <= sizes[-1].nbytes + sum(shape) * 8
    assert [option.amount for option in sizes] == sorted({option.amount for option in sizes})
    for option in few.options(weight, stats)[1:]:
        made = few.compress(weight, stats, option.amount).to_dense()
        assert lost(weight, made, x) == pytest.approx(option.error, rel=1e-6)
    assert few.compress(weight, stats, min(shape)).rank == min(shape)


def test_as_many_ranks_are_offered_as_asked_for():
    sizes = NSVD().sizes((4096, 11008), 2)
    assert len(sizes) == 1 + NSVD().ranks
    assert sizes[-1].nbytes < 4096 * 11008 * 2
    assert {after.amount - before.amount for before, after in pairwise(sizes)} <= {93, 94}
    for shape, most in (((128, 384), 128), ((129, 384), 32)):
        assert len(NSVD().sizes(shape, 2)) == 1 + most
        assert len(NSVD(ranks=1000).sizes(shape, 2)) == 1 + min(shape)


# --- hard inputs ------------------------------------------------------------------------------------------------------


@every_shape
@every_share
@every_second
def test_fewer_tokens_than_channels_need_no_root_of_the_gram_matrix(shape, share, second):
    weight, x, _ = case(shape)
    x = x[:5]
    method, stats = undamped(share, second), observed(x)
    energy = method.options(weight, stats)[0].error
    for option in method.options(weight, stats)[1:]:
        made = method.compress(weight, stats, option.amount)
        assert all(factor.isfinite().all() for factor in made.parameters())
        assert lost(weight, made.to_dense(), x) == pytest.approx(option.error, abs=1e-10 * energy)


@every_second
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_weight_of_low_rank_is_given_back_whole(second, rank):
    weight, (_, _, stats) = normal(20, max(rank, 1)) @ normal(max(rank, 1), 12, seed=3) * bool(rank), case((20, 12))
    for asked in (rank + 2, 8, 12):
        made = NSVD(second=second, share=0.8).compress(weight, stats, asked)
        assert made.rank == asked
        torch.testing.assert_close(made.to_dense(), weight, rtol=0, atol=1e-9)


@every_second
def test_a_silent_input_leaves_plain_svd(second):
    weight, stats = normal(7, 5), observed(torch.zeros(20, 5, dtype=torch.float64))
    ours = NSVD(share=0.5).compress(weight, stats, 3).to_dense()
    assert close(ours, PlainSVD().compress(weight, stats, 3).to_dense())
    assert NSVD(second=second).compress(weight, stats, 3).to_dense().isfinite().all()


def test_what_is_not_finite_or_overflows_is_an_error_of_ours():
    weight, x, stats = case((6, 8))
    bad = weight.clone()
    bad[2, 3] = math.nan
    x[1, 1] = math.inf
    for broken, seen in ((bad, stats), (weight, observed(x)), (1e200 * weight, stats)):
        for ask in (NSVD().options, lambda *arguments: NSVD().compress(*arguments, 2)):
            with pytest.raises(NumericalError):
                ask(broken, seen)


@pytest.mark.parametrize(
    "fields",
    [
        {"share": -0.1},
        {"share": 1.1},
        {"share": math.nan},
        {"second": "qr"},
        {"damping": -1.0},
        {"damping": math.inf},
        {"ranks": 0},
    ],
)
def test_a_field_out_of_range_is_refused_with_what_was_wanted(fields):
    (field,) = fields
    with pytest.raises(RecipeError, match=rf"nsvd: {field} .*; wanted"):
        NSVD(**fields)


def test_a_rank_that_does_not_exist_is_refused():
    weight, _, stats = case((6, 8))
    for rank in (-1, 0, 7):
        with pytest.raises(RecipeError, match=rf"rank {rank} for a weight of .* wanted 1 to 6"):
            NSVD().compress(weight, stats, rank)
