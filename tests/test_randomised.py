"""The randomised truncation: what it says of its own error is true, and a few products bring it to the optimum."""

import pytest
import torch
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.linalg.randomised import leading_basis
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.stats import Gram, Stats

SHAPES = {"wide": (40, 90), "tall": (90, 40), "square": (64, 64)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def case(shape: tuple[int, int], decay: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(*shape, dtype=torch.float64, generator=generator)
    x = torch.randn(400, shape[1], dtype=torch.float64, generator=generator)
    x = x * torch.arange(1, shape[1] + 1, dtype=torch.float64) ** -decay
    return weight, x.T @ x / len(x)


def lost(weight: Tensor, basis, rank: int, metric: Tensor) -> float:
    up, down = basis.factors(rank)
    difference = weight - up @ down
    return ((difference @ metric) * difference).sum().item()


@every_shape
@pytest.mark.parametrize("power", [1, 2, 4])
def test_it_knows_what_it_leaves_behind(shape, power):
    weight, metric = case(shape)
    basis = leading_basis(weight, metric, 12, power)
    whole = output_basis(weight, metric).energy.sum().item()
    for rank in (3, 12):
        assert basis.left_over()[rank].item() == pytest.approx(lost(weight, basis, rank, metric), abs=3e-6 * whole)
    assert torch.allclose(basis.up.T @ basis.up, torch.eye(12), atol=2e-6)


@every_shape
def test_products_bring_it_to_the_optimum(shape):
    weight, metric = case(shape, decay=0.7)
    best = output_basis(weight, metric).left_over()[10].item()
    errors = [lost(weight, leading_basis(weight, metric, 10, power), 10, metric) for power in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) or max(errors) < best * (1 + 1e-4)
    assert best * (1 - 1e-6) <= errors[-1] <= best * 1.0005


@every_shape
def test_a_block_as_wide_as_the_weight_is_exact(shape):
    weight, metric = case(shape)
    rank = min(shape) - 1
    best = output_basis(weight, metric)
    assert leading_basis(weight, metric, rank, 1).energy[:rank] == pytest.approx(best.energy[:rank], rel=1e-2)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_scales_change_nothing(scale):
    weight, metric = case((40, 90))
    usual, scaled = (leading_basis(weight, metric * s, 8, 2) for s in (1.0, scale))
    assert torch.allclose(usual.factors(8)[0] @ usual.factors(8)[1], scaled.factors(8)[0] @ scaled.factors(8)[1])
    assert scaled.energy == pytest.approx(usual.energy * scale, rel=1e-5)


def test_equal_inputs_give_equal_results():
    weight, metric = case((40, 90))
    first, second = (leading_basis(weight, metric, 8, 2) for _ in range(2))
    assert torch.equal(first.up, second.up)
    assert not torch.equal(first.up, leading_basis(weight, metric, 8, 2, seed=1).up)


def test_nothing_observed_and_nothing_finite():
    weight, metric = case((40, 90))
    assert leading_basis(weight, torch.zeros_like(metric), 4, 1).energy.sum() == 0
    assert torch.isfinite(leading_basis(torch.zeros_like(weight), metric, 4, 1).factors(4)[0]).all()
    metric[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="input statistic"):
        leading_basis(weight, metric, 4, 1)


def test_a_method_may_truncate_by_it():
    weight, metric = case((40, 90), decay=0.7)
    stats = Stats({Gram: Gram.restore({"sum": metric, "tokens": torch.tensor(1)})})
    exact, randomised = (WhitenedSVD(power=power).compress(weight, stats, 10).to_dense() for power in (None, 4))
    errors = [(((weight - made) @ metric) * (weight - made)).sum().item() for made in (exact, randomised)]
    assert errors[0] < errors[1] < errors[0] * 1.01
    for wrong in ({"power": 0}, {"power": 2, "update": True}):
        with pytest.raises(RecipeError, match="power"):
            WhitenedSVD(**wrong)


@every_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_taken_as_they_are(shape, dtype):
    weight, metric = case(shape)
    half = weight.to(dtype)
    found, exact = leading_basis(half, metric, 8, 3), output_basis(half, metric)
    assert found.left_over()[0].item() == pytest.approx(exact.left_over()[0].item(), rel=1e-6)
    assert torch.equal(found.left_over(), leading_basis(half.float(), metric, 8, 3).left_over())
