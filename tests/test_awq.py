"""Columns of loud inputs scaled up before rounding: never worse than rounding to nearest, in the metric of inputs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract.material import correlated, normal, observed
from tersely.errors import NumericalError, RecipeError
from tersely.kinds import QuantizedLinear
from tersely.linalg.grid import FORMS, Scales, fit_grid
from tersely.methods.quantize.awq import QUIETEST, ActivationAware, _factors, _Metric
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.stats import Gram, Stats

BITS = (2, 3, 4)
PLAIN = ActivationAware(group=8, clip=False)


def loud(width: int, tokens: int = 300) -> Tensor:
    """A few channels are thirty times as loud as the others."""
    return normal(tokens, width, seed=3) * torch.where(torch.arange(width) % 7 == 0, 30.0, 1.0)


def lost(weight: Tensor, made: QuantizedLinear, x: Tensor) -> float:
    return ((weight - made.to_dense().double()) @ x.T).square().sum().item() / len(x)


def stats_of(x: Tensor) -> Stats:
    return observed((Gram,), x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_without_scaling_it_is_rounding_to_nearest(form, bits):
    weight = normal(12, 20)
    made = ActivationAware(group=8, grid=form, points=0, clip=False).compress(weight, stats_of(loud(20)), bits)
    plain = RoundToNearest(group=8, grid=form).compress(weight, Stats(), bits)
    assert torch.equal(made.unpacked(), plain.unpacked())
    assert torch.equal(made.to_dense(), plain.to_dense())


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    st.integers(0, 12),
    st.sampled_from(BITS),
    st.sampled_from(FORMS),
    st.booleans(),
    st.sampled_from([loud, correlated]),
)
def test_it_never_loses_more_than_rounding_to_nearest(shape, group, bits, form, clip, look):
    weight, x = normal(*shape, seed=5), look(shape[1])
    made = ActivationAware(group=group, grid=form, clip=clip).compress(weight, stats_of(x), bits)
    plain = RoundToNearest(group=group, grid=form).compress(weight, Stats(), bits)
    assert lost(weight, made, x) <= lost(weight, plain, x) * (1 + 1e-9)


@pytest.mark.parametrize("bits", BITS)
def test_every_choice_gains_on_loud_channels(bits):
    weight, x = normal(24, 64), loud(64)
    stats = stats_of(x)
    losses = [
        lost(weight, method.compress(weight, stats, bits), x)
        for method in (RoundToNearest(group=16), replace(PLAIN, group=16), ActivationAware(group=16))
    ]
    assert losses[1] < 0.6 * losses[0]
    assert losses[2] <= losses[1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("look", [loud, correlated])
def test_with_error_feedback_it_is_never_worse_than_without_scaling(bits, look):
    weight, x = normal(24, 64), look(64)
    stats = stats_of(x)
    made = ActivationAware(group=16, rounding="gptq").compress(weight, stats, bits)
    alone = ActivationAware(group=16, rounding="gptq", points=0, clip=False).compress(weight, stats, bits)
    assert torch.equal(alone.to_dense(), GPTQ(group=16).compress(weight, stats, bits).to_dense())
    assert lost(weight, made, x) <= lost(weight, alone, x) * (1 + 1e-9)
    if look is correlated:  # else there is nothing to feed back
        nearest = ActivationAware(group=16).compress(weight, stats, bits)
        assert lost(weight, made, x) < lost(weight, nearest, x)


def test_the_best_exponent_is_the_best_of_all_that_were_tried():
    """Every exponent by hand: scale, round, scale back."""
    weight, x = normal(10, 24), loud(24)
    gram = x.T @ x / len(x)
    power = gram.diagonal()
    best = float("inf")
    for point in range(21):
        factors = (power / power.max()).pow(-point / 40)
        columns = Scales.of(factors.float()).values().double()
        scaled = weight / columns
        grid = fit_grid(scaled, 3, 8)
        off = weight - grid.levels(grid.nearest(scaled)).double() * columns
        best = min(best, ((off @ gram) * off).sum().item())
    made = PLAIN.compress(weight, stats_of(x), 3)
    assert lost(weight, made, x) == pytest.approx(best, rel=1e-6)
    (option,) = [option for option in PLAIN.options(weight, stats_of(x)) if option.amount == 3]
    assert option.error == pytest.approx(best, rel=1e-6)


def test_a_louder_channel_gets_a_finer_step():
    gram = torch.diag(torch.tensor([1.0, 4.0, 16.0, 0.0], dtype=torch.float64))
    factors = _factors(gram, 1.0).values().double()
    torch.testing.assert_close(factors / factors[2], torch.tensor([4.0, 2.0, 1.0, 4.0], dtype=torch.float64))
    assert torch.equal(_factors(gram, 0.0).values(), torch.ones(4))
    extreme = torch.diag(torch.tensor([1e30, 1e-30, 1.0], dtype=torch.float64))
    assert _factors(extreme, 1.0).values().max() <= QUIETEST**-0.5 * 1.001


def test_the_error_in_groups_is_that_of_uncorrelated_groups():
    weight, x = normal(5, 11), loud(11)
    gram = x.T @ x / len(x)
    metric = _Metric.of(weight, gram)
    apart = torch.block_diag(*(gram[start : start + 4, start : start + 4] for start in (0, 4, 8)))
    off = normal(5, 11, seed=9)
    found = metric.lost_in_groups(off, 4).sum((1, 2))
    torch.testing.assert_close(found, _Metric(metric.gram / gram * apart.nan_to_num(), metric.unit).lost(off))
    whole = _Metric.of(weight, gram).lost_in_groups(off, 0)[:, 0, 0]
    torch.testing.assert_close(whole, metric.lost(off))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_inputs_does_not_matter(size):
    weight, x = normal(6, 16, dtype=torch.float32), loud(16)
    first = ActivationAware(group=8, rounding="gptq").compress(weight, stats_of(x), 3)
    second = ActivationAware(group=8, rounding="gptq").compress(weight, stats_of(x * size), 3)
    torch.testing.assert_close(first.to_dense(), second.to_dense(), rtol=1e-3, atol=1e-3)


def test_factors_of_the_columns_are_counted():
    (size,) = ActivationAware(group=64, width=4).sizes((128, 128), 4)[1:]
    (plain,) = RoundToNearest(group=64, width=4).sizes((128, 128), 4)[1:]
    made = ActivationAware(group=64).compress(normal(128, 128), stats_of(loud(128)), 4)
    assert size.nbytes == plain.nbytes + 2 * 128 == made.nbytes()


def test_a_gram_matrix_that_is_not_finite_is_refused():
    stats = stats_of(torch.full((4, 8), float("nan"), dtype=torch.float64))
    with pytest.raises(NumericalError, match="finite"):
        PLAIN.compress(normal(3, 8), stats, 3)


@pytest.mark.parametrize(
    ("said", "message"),
    [({"points": -1}, r"points = -1"), ({"rounding": "up"}, "rounding = 'up'"), ({"group": -1}, "awq: group -1")],
)
def test_what_cannot_be_is_refused(said, message):
    with pytest.raises(RecipeError, match=message):
        ActivationAware(**said)
