"""The alternation of two least-squares problems: monotone, a subspace iteration, and at rest in the whitened optimum.

W is the weight, G the mean of x xᵀ; the factors of the paper are found by its own pseudo-inverses.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.adasvd import AdaSVD, alternated
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.stats import BucketGram, Gram, Stats
from tersely.stats.gram import BUCKET

SHAPES = {"wide": (10, 24), "tall": (24, 10), "square": (16, 16)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(width: int, tokens: int = 300) -> Tensor:
    """Inputs of which some channels are loud and all are mixed."""
    loudness = torch.logspace(0.3, -0.7, width, dtype=torch.float64)
    return normal(tokens, width, seed=1) * loudness @ normal(width, width, seed=2) * loudness.flip(0).sqrt()


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


def close(first: Tensor, second: Tensor, tolerance: float = 1e-8) -> bool:
    return torch.linalg.norm(first - second).item() <= tolerance * torch.linalg.norm(second).item()


def undamped(iterations: int) -> AdaSVD:
    return AdaSVD(iterations=iterations, damping=0.0)


def steps(weight: Tensor, gram: Tensor, down: Tensor, rounds: int) -> list[Tensor]:
    """W' after each half of each round, as the paper writes it: U by a pseudo-inverse, then V by another."""
    found = []
    for _ in range(rounds):
        up = weight @ gram @ down.T @ torch.linalg.pinv(down @ gram @ down.T, hermitian=True)
        found.append(up @ down)
        down = torch.linalg.pinv(up) @ weight
        found.append(up @ down)
    return found


@every_shape
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_it_is_the_alternation_of_the_paper(shape, iterations):
    weight, _, stats = case(shape)
    for rank in range(1, min(shape) + 1):
        start = PlainSVD().compress(weight, stats, rank).down.weight.detach()
        wanted = steps(weight, stats[Gram].mean(), start, iterations)[-1]
        assert close(undamped(iterations).compress(weight, stats, rank).to_dense(), wanted)


@every_shape
def test_neither_step_of_the_alternation_raises_the_error(shape):
    weight, x, stats = case(shape)
    for rank in (1, 4, 9):
        start = PlainSVD().compress(weight, stats, rank)
        path = steps(weight, stats[Gram].mean(), start.down.weight.detach(), 20)
        errors = [lost(weight, made, x) for made in (start.to_dense(), *path)]
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))


@every_shape
def test_more_rounds_fall_to_the_whitened_optimum(shape):
    weight, _, stats = case(shape)
    optimum = [option.error for option in WhitenedSVD(0.0).options(weight, stats)]
    path = [[option.error for option in undamped(rounds).options(weight, stats)] for rounds in (0, 1, 2, 4, 16, 3000)]
    for before, after in pairwise(path):
        assert all(now <= then * (1 + 1e-12) + 1e-14 * optimum[0] for then, now in zip(before, after, strict=True))
    assert path[0][5] > 1.001 * optimum[5]
    assert path[-1] == pytest.approx(optimum, rel=1e-6, abs=1e-12 * optimum[0])


@every_shape
@pytest.mark.parametrize("iterations", [1, 15])
def test_from_the_whitened_optimum_nothing_moves(shape, iterations):
    """So the start of the paper, with the same inputs, has nothing to gain."""
    weight, _, stats = case(shape)
    gram = stats[Gram].mean()
    start = output_basis(weight, gram)
    after = alternated(start, gram, iterations)
    torch.testing.assert_close(after.left_over(), start.left_over(), rtol=1e-10, atol=1e-12)
    for rank in range(1, min(shape) + 1):
        (up, down), (up_before, down_before) = after.factors(rank), start.factors(rank)
        assert close(up @ down, up_before @ down_before)


@every_shape
def test_without_a_round_it_is_plain_svd_to_the_bit(shape):
    weight, _, stats = case(shape)
    for rank in range(1, min(shape) + 1):
        ours, theirs = undamped(0).compress(weight, stats, rank), PlainSVD().compress(weight, stats, rank)
        assert torch.equal(ours.up.weight, theirs.up.weight)
        assert torch.equal(ours.down.weight, theirs.down.weight)


@every_shape
@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_the_error_of_every_rank_is_the_measured_one(shape, iterations):
    weight, x, stats = case(shape)
    nothing, *options = undamped(iterations).options(weight, stats)
    assert nothing.error == pytest.approx(lost(weight, torch.zeros_like(weight), x), rel=1e-12)
    for before, after in pairwise([nothing, *options]):
        assert after.error <= before.error
    for option in options:
        made = undamped(iterations).compress(weight, stats, option.amount).to_dense()
        assert lost(weight, made, x) == pytest.approx(option.error, abs=1e-9 * nothing.error)
    assert options[-1].error == 0.0
    assert close(made, weight, 1e-11)


@every_shape
def test_damping_bounds_the_error_from_above(shape):
    weight, x, stats = case(shape)
    method, power = AdaSVD(iterations=2, damping=0.01), stats[Gram].mean().diagonal().mean().item()
    for option in method.options(weight, stats)[1:]:
        made = method.compress(weight, stats, option.amount).to_dense()
        slack = 0.01 * power * (weight - made).square().sum().item()
        assert lost(weight, made, x) + slack == pytest.approx(option.error, abs=1e-7)


@every_shape
@pytest.mark.parametrize("iterations", [1, 20])
def test_statistics_and_weights_of_low_rank_need_no_cut_off(shape, iterations):
    """Where the pseudo-inverses of the paper would have to decide what is zero."""
    weight, x, _ = case(shape)
    poor = weight[:, :3] @ normal(3, shape[1], seed=4)
    for matrix, tokens in ((weight, x[:4]), (poor, x), (poor, x[:2]), (torch.zeros_like(weight), x)):
        stats = observed(tokens)
        options = undamped(iterations).options(matrix, stats)
        for option in options[1:]:
            made = undamped(iterations).compress(matrix, stats, option.amount)
            assert all(factor.isfinite().all() for factor in made.parameters())
            assert lost(matrix, made.to_dense(), tokens) == pytest.approx(option.error, abs=1e-9 * options[0].error)
        torch.testing.assert_close(made.to_dense(), matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_louder_activations_change_nothing(scale):
    weight, x, stats = case((16, 16))
    louder = observed(scale * x)
    for rank in (1, 8):
        same = AdaSVD(iterations=9).compress(weight, stats, rank).to_dense()
        assert close(AdaSVD(iterations=9).compress(weight, louder, rank).to_dense(), same)


def test_what_is_not_finite_or_overflows_is_an_error_of_ours():
    weight, x, stats = case((6, 8))
    bad = weight.clone()
    bad[2, 3] = math.nan
    loud = observed(1e150 * x)
    x[1, 1] = math.inf
    for broken, seen in ((bad, stats), (weight, observed(x)), (1e200 * weight, stats), (1e100 * weight, loud)):
        for ask in (AdaSVD().options, lambda *arguments: AdaSVD().compress(*arguments, 2)):
            with pytest.raises(NumericalError):
                ask(broken, seen)


@pytest.mark.parametrize("fields", [{"iterations": -1}, {"damping": -1.0}, {"damping": math.nan}])
def test_a_field_out_of_range_is_refused_with_what_was_wanted(fields):
    (field,) = fields
    with pytest.raises(RecipeError, match=rf"adasvd: {field} .*; wanted"):
        AdaSVD(**fields)


def test_a_rank_that_does_not_exist_is_refused():
    weight, _, stats = case((6, 8))
    for rank in (-1, 0, 7):
        with pytest.raises(RecipeError, match=rf"rank {rank} for a weight of .* wanted 1 to 6"):
            AdaSVD().compress(weight, stats, rank)


# --- as the paper writes it -------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("tokens", [300, 6])
def test_steps_by_pseudo_inverses_of_the_activations_are_those_by_the_gram_matrix(shape, tokens):
    """𝒰ᵀ = (Xᵀ𝒱)⁺ XᵀWᵀ and 𝒱ᵀ = 𝒰⁺ W on real activations, tokens by width, against the form that holds no token."""
    weight = normal(*shape)
    x = correlated(shape[1], tokens)
    gram = observed(x)[Gram].mean()
    for rank in (1, min(4, *shape)):
        start = PlainSVD().compress(weight, Stats(), rank).down.weight.detach()
        down, path = start, []
        for _ in range(3):
            up = (torch.linalg.pinv(x @ down.T, rtol=1e-10) @ x @ weight.T).T
            path.append(up @ down)
            down = torch.linalg.pinv(up) @ weight
            path.append(up @ down)
        for found, wanted in zip(path, steps(weight, gram, start, 3), strict=True):
            assert close(found, wanted, 1e-6)


def in_buckets(windows: Tensor) -> tuple[BucketGram, Tensor]:
    """The statistic of these windows, [windows, tokens, width], and the averaged tokens."""
    gram = BucketGram(windows.shape[-1])
    for window in windows:
        gram.update(window)
    return gram, torch.cat([part.mean(0) for part in windows.split(BUCKET)])


@pytest.mark.parametrize("count", [1, BUCKET - 1, BUCKET, 2 * BUCKET + 5])
def test_a_bucket_is_the_mean_of_its_windows_position_by_position(count):
    windows = correlated(12, 20 * count).view(count, 20, 12)
    gram, averaged = in_buckets(windows)
    torch.testing.assert_close(gram.mean(), averaged.T @ averaged / len(averaged), rtol=1e-12, atol=1e-13)
    assert gram.tokens == 20 * count
    first, second = in_buckets(windows)[0], in_buckets(windows + 1)[0]
    wanted = torch.cat([averaged, in_buckets(windows + 1)[1]])
    for one, other in ((first, in_buckets(windows + 1)[0]), (second, in_buckets(windows)[0])):
        one.merge(other)
        torch.testing.assert_close(one.mean(), wanted.T @ wanted / len(wanted), rtol=1e-12, atol=1e-13)


def test_averaging_keeps_what_windows_share_and_shrinks_the_rest():
    """x = m + noise: the second moments are m mᵀ and a part of the noise's, one in so many as windows are averaged."""
    shared = normal(1, 40, 8, seed=5)
    windows = shared + 3 * normal(4 * BUCKET, 40, 8, seed=6)
    gram, _ = in_buckets(windows)
    plain = observed(windows.flatten(0, 1))[Gram].mean()
    own = shared[0].T @ shared[0] / 40
    scale = own.diagonal().mean().item()
    torch.testing.assert_close(
        gram.mean(), own + 9 / BUCKET * torch.eye(8, dtype=torch.float64), rtol=0, atol=0.4 * scale
    )
    torch.testing.assert_close(plain, own + 9 * torch.eye(8, dtype=torch.float64), rtol=0, atol=0.4 * scale)


@every_shape
def test_buckets_cost_what_they_save(shape):
    """What the alternation falls to with averages loses more on the tokens than what it falls to with all of them."""
    weight = normal(*shape)
    windows = correlated(shape[1], 20 * 2 * BUCKET).view(2 * BUCKET, 20, shape[1])
    tokens = windows.flatten(0, 1)
    plain = observed(tokens)
    buckets = Stats({BucketGram: in_buckets(windows)[0]})
    for rank in (2, 5):
        fitted = undamped(1000).compress(weight, plain, rank).to_dense()
        averaged = replace(undamped(1000), buckets=True).compress(weight, buckets, rank).to_dense()
        assert lost(weight, averaged, tokens) > lost(weight, fitted, tokens) * (1 + 1e-4)


def test_with_buckets_it_asks_for_nothing_else():
    method = AdaSVD(buckets=True)
    assert method.needs == (BucketGram,)
    weight, x, _ = case((10, 24))
    buckets, _ = in_buckets(x.view(10, 30, 24))
    options = method.options(weight, Stats({BucketGram: buckets}))
    assert options[0].error == pytest.approx((weight @ buckets.mean() @ weight.T).trace().item(), rel=1e-4)
