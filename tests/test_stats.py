"""A statistic is a sum: the pieces do not matter, nor who gathered them, nor a stay on disk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely.journal import commit_tensors, read_tensors
from tersely.stats import (
    STATISTICS,
    AbsMax,
    AbsMean,
    BucketGram,
    Cross,
    DiagonalFisher,
    Drift,
    Fisher,
    Gram,
    MeanGradient,
    OutputGram,
    Peaks,
    Power,
    Statistic,
    Stats,
    WindowFactors,
)

WIDTH = 7

every_statistic = pytest.mark.parametrize("kind", STATISTICS.values(), ids=STATISTICS)
ADDED_UP = {name: kind for name, kind in STATISTICS.items() if kind is not BucketGram}
every_sum = pytest.mark.parametrize("kind", ADDED_UP.values(), ids=ADDED_UP)
"""Those that do not care where a window ends."""


def rows(tokens: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gathered(kind: type[Statistic], *pieces: Tensor) -> Statistic:
    statistic = kind(pieces[0].shape[1])
    for piece in pieces:
        statistic.update(piece)
    return statistic


def by_definition(kind: type[Statistic], x: Tensor) -> Tensor:
    x = x.double()
    gram = x.T @ x / len(x)
    return {
        Gram: gram,
        BucketGram: gram,  # of one window
        Cross: torch.zeros_like(gram),  # nothing has been shifted
        Drift: x[:0],  # nor has the stream drifted
        OutputGram: gram,  # of gradients in the place of inputs
        Fisher: x.square().mean(0),  # of the rows of a weight's gradient
        DiagonalFisher: x.square().mean(0),  # of the gradient in a weight, one window a row
        MeanGradient: x.mean(0),  # of the gradient in a weight, one window a row
        Power: x.square().mean(0),
        WindowFactors: gram,  # of the windows kept, here all of them
        AbsMean: x.abs().mean(0),
        AbsMax: x.abs().amax(0),
        Peaks: torch.stack([x.abs().max(), x.abs().amax(1).bfloat16().median().double()]),
    }[kind]


cuts = st.lists(st.integers(0, 40), max_size=5).map(sorted)  # any pieces of 40 rows, empty ones among them


@every_sum
@settings(max_examples=30, deadline=None, database=None)
@given(cuts=cuts)
def test_pieces_give_what_the_whole_gives(kind, cuts):
    x = rows(40)
    statistic = gathered(kind, *x.tensor_split(cuts))
    torch.testing.assert_close(statistic.mean(), by_definition(kind, x), rtol=1e-12, atol=1e-13)
    assert statistic.mean().dtype == torch.float64
    assert statistic.tokens == 40


@every_sum
@settings(max_examples=30, deadline=None, database=None)
@given(cuts=cuts, order=st.randoms(use_true_random=False))
def test_merging_is_concatenation_in_any_order(kind, cuts, order):
    x = rows(40)
    parts = [gathered(kind, piece) for piece in x.tensor_split(cuts)]
    order.shuffle(parts)
    first, *others = parts
    for other in others:
        seen, tokens = other.mean().clone(), other.tokens
        first.merge(other)
        assert torch.equal(other.mean(), seen) and other.tokens == tokens
    torch.testing.assert_close(first.mean(), by_definition(kind, x), rtol=1e-12, atol=1e-13)
    assert first.tokens == 40


@every_statistic
def test_a_merged_statistic_goes_its_own_way(kind):
    first, second = gathered(kind, rows(5)), gathered(kind, rows(5, seed=1))
    before = second.mean().clone()
    first.merge(second)
    first.update(rows(5, seed=2))
    assert torch.equal(second.mean(), before)


@every_statistic
def test_before_the_first_token_everything_is_zero(kind):
    empty = gathered(kind, rows(0))
    assert empty.tokens == 0
    assert torch.equal(empty.mean(), torch.zeros_like(by_definition(kind, rows(1))))
    full = gathered(kind, rows(9))
    before = full.mean().clone()
    full.merge(empty)
    empty.merge(full)
    assert torch.equal(full.mean(), before) and torch.equal(empty.mean(), before)
    assert full.tokens == empty.tokens == 9


@every_statistic
def test_a_state_on_disk_restores_every_bit(kind, tmp_path):
    statistic = gathered(kind, rows(11), rows(3, seed=1))
    commit_tensors(tmp_path / "state.safetensors", statistic.state())
    restored = kind.restore(read_tensors(tmp_path / "state.safetensors"))
    assert torch.equal(restored.mean(), statistic.mean())
    assert restored.tokens == statistic.tokens == 14
    for both in (restored, statistic):
        both.update(rows(4, seed=2))
    assert torch.equal(restored.mean(), statistic.mean())


@every_statistic
def test_a_restored_statistic_is_another_one(kind):
    statistic = gathered(kind, rows(11))
    before = statistic.mean().clone()
    kind.restore(statistic.state()).update(10 * rows(4, seed=1))
    assert torch.equal(statistic.mean(), before)


def test_how_far_the_stream_has_drifted_is_told_input_by_input():
    x, drift = rows(20), rows(20, width=3, seed=1)
    first, second = Drift(WIDTH), Drift(WIDTH)
    Stats({Drift: first}).update(x[:8], x[:8], drift[:8])
    Stats({Drift: second}).update(x[8:], x[8:], drift[8:])
    for merged in (Drift(WIDTH), Drift.restore(first.state())):
        for part in (first, second)[merged.tokens > 0 :]:
            merged.merge(part)
        torch.testing.assert_close(merged.mean(), drift.T @ x / 20, rtol=1e-12, atol=1e-13)
        assert merged.tokens == 20
    assert torch.equal(first.mean(), drift[:8].T @ x[:8] / 8)


def test_the_diagonal_of_the_gram_matrix_is_the_power():
    gram, power = gathered(Gram, rows(50)), gathered(Power, rows(50))
    torch.testing.assert_close(gram.mean().diagonal(), power.mean(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("width", [1, 64, 65, 300, 600])
def test_both_halves_of_a_second_moment_are_the_same_bits(width):
    """Only the lower one is summed; widths of one strip, of several, and of strips that do not come out even."""
    x = rows(20, width)
    for gathered_of_pieces in (
        gathered(Gram, x[:7], x[7:]).mean(),
        gathered(BucketGram, x[:10], x[10:]).mean(),
        gathered(Cross, x[:7], x[7:]).dense(),
    ):
        assert torch.equal(gathered_of_pieces, gathered_of_pieces.T)
    torch.testing.assert_close(gathered(Gram, x[:7], x[7:]).mean(), by_definition(Gram, x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 4096, 3 * 4096 + 1])
def test_the_gram_matrix_of_low_precision_inputs_is_as_accurate_as_one_product(dtype, tokens):
    """To a few 1e-7 of √(G_ii G_jj), the scale on which a factorisation feels an error, however long calibration is."""
    shared = rows(tokens, 1) * 100  # correlated, loud, and off centre: the sums are far larger than their terms
    x = (shared + rows(tokens, 32, seed=1) + 50).to(dtype)
    gram = gathered(Gram, *x.split(4096)).mean()
    exact = by_definition(Gram, x)
    scale = exact.diagonal().sqrt()
    assert ((gram - exact).abs() / (scale[:, None] * scale)).max().item() < 1e-6


@pytest.mark.parametrize("kind", [Power, AbsMean, AbsMax])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_channels_are_measured_in_float64_whatever_comes(kind, dtype):
    x = (1000 * rows(3000)).to(dtype)
    statistic = gathered(kind, *x.split(1000))
    torch.testing.assert_close(statistic.mean(), by_definition(kind, x), rtol=1e-13, atol=0)


@every_statistic
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_vanish_in_a_sum(kind, bad):
    x = rows(30)
    x[4, 2] = bad
    statistic = kind(WIDTH)
    for piece in x.split(10):
        Stats({kind: statistic}).update(piece, piece, piece)
    assert not statistic.mean().isfinite().all()


@every_statistic
def test_the_input_is_left_alone(kind):
    x = rows(6)
    before = x.clone()
    gathered(kind, x)
    assert torch.equal(x, before)


def test_stats_feed_every_accumulator_and_know_what_they_hold():
    stats = Stats({Gram: Gram(WIDTH), AbsMax: AbsMax(WIDTH)})
    assert stats.tokens == 0
    stats.update(rows(8))
    assert stats.tokens == stats[Gram].tokens == stats[AbsMax].tokens == 8
    assert torch.equal(stats[Gram].mean(), gathered(Gram, rows(8)).mean())
    assert set(stats.kinds()) == {Gram, AbsMax}
    assert Gram in stats and Power not in stats
    assert Stats().tokens == 0


def test_a_statistic_that_was_not_gathered_is_named_beside_those_that_were():
    with pytest.raises(KeyError, match=r"no Power was gathered .*\(gathered: AbsMax, Gram\); add it to `needs`"):
        Stats({Gram: Gram(WIDTH), AbsMax: AbsMax(WIDTH)})[Power]
    with pytest.raises(KeyError, match=r"gathered: nothing"):
        Stats()[Gram]
