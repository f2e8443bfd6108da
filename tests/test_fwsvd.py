"""Truncation in the metric of squared gradients: exact in its own measure, blind to the unit of the gradients."""

import pytest
import torch
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import dense_weight
from tersely.methods.low_rank.fwsvd import FLOOR, FisherWeightedSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.stats import Fisher, Stats

SHAPES = {"wide": (10, 24), "tall": (24, 10), "square": (16, 16), "row": (1, 9), "column": (9, 1)}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loud_channels(shape: tuple[int, int], windows: int = 6) -> list[Tensor]:
    """Gradients in a weight, window by window; some input channels matter far more than others."""
    loudness = torch.logspace(1, -1.5, shape[1], dtype=torch.float64)
    return [normal(*shape, seed=1 + window) * loudness for window in range(windows)]


def observed(gradients: list[Tensor]) -> Stats:
    stats = Stats({Fisher: Fisher(gradients[0].shape[1])})
    for gradient in gradients:
        stats.update(gradient)
    return stats


def scales(gradients: list[Tensor]) -> Tensor:
    """fⱼ, by the formula of the paper."""
    return torch.stack(gradients).square().mean(0).mean(0).sqrt()


@every_shape
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_it_loses_the_dropped_singular_values_of_the_scaled_weight(shape, alpha):
    weight, gradients = normal(*shape), loud_channels(shape)
    method, stats, f = FisherWeightedSVD(alpha=alpha), observed(gradients), scales(gradients) ** alpha
    sigma = torch.linalg.svdvals(weight * f)
    options = method.options(weight, stats)
    for option in options[1:]:
        made = method.compress(weight, stats, option.amount).to_dense()
        lost, wanted = ((weight - made) * f).square().sum().item(), sigma[option.amount :].square().sum().item()
        assert lost == pytest.approx(wanted, rel=1e-9, abs=1e-12 * options[0].error)
        assert option.error == pytest.approx(wanted, rel=1e-9, abs=1e-12 * options[0].error)
    assert options[0].error == pytest.approx(sigma.square().sum().item())


@every_shape
def test_it_is_the_truncation_that_is_scaled_and_scaled_back(shape):
    weight, gradients = normal(*shape), loud_channels(shape)
    f, rank = scales(gradients), max(1, min(shape) // 2)
    u, s, v = torch.linalg.svd(weight * f, full_matrices=False)
    wanted = (u[:, :rank] * s[:rank]) @ v[:rank] / f
    made = FisherWeightedSVD().compress(weight, observed(gradients), rank).to_dense()
    torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-9, 3.0, 1e6])
def test_the_unit_of_the_loss_does_not_matter(factor):
    weight, gradients = normal(12, 20), loud_channels((12, 20))
    method, louder = FisherWeightedSVD(), observed([factor * gradient for gradient in gradients])
    made, same = (method.compress(weight, stats, 5).to_dense() for stats in (observed(gradients), louder))
    torch.testing.assert_close(same, made, rtol=1e-9, atol=1e-11)
    errors, theirs = (method.options(weight, stats) for stats in (observed(gradients), louder))
    assert [o.error for o in theirs] == pytest.approx([o.error * factor**2 for o in errors], rel=1e-9)


def test_it_predicts_the_loss_of_a_quadratic_whose_curvature_is_the_metric():
    """½ Σ E[D²] Δ² is half the error, where all rows of a gradient are as large: no mean over them loses anything."""
    weight, gradients = normal(12, 20), [row.expand(12, 20) for row in normal(5, 1, 20, seed=3)]
    stats, method = observed(gradients), FisherWeightedSVD()
    information = torch.stack(gradients).square().mean(0)
    option = method.options(weight, stats)[4]
    change = weight - method.compress(weight, stats, 4).to_dense()
    assert 0.5 * (information * change.square()).sum().item() == pytest.approx(option.error / 2, rel=1e-9)


def test_without_an_exponent_and_without_gradients_it_is_plain_truncation():
    weight = normal(12, 20)
    plain = PlainSVD().compress(weight, Stats(), 5).to_dense()
    for method, stats in (
        (FisherWeightedSVD(alpha=0.0), observed(loud_channels((12, 20)))),
        (FisherWeightedSVD(), observed([torch.zeros(12, 20)])),
    ):
        torch.testing.assert_close(method.compress(weight, stats, 5).to_dense(), plain, rtol=1e-9, atol=1e-11)


def test_channels_without_a_gradient_are_not_thrown_away():
    gradients = loud_channels((12, 20))
    for gradient in gradients:
        gradient[:, ::3] = 0
    weight, stats = normal(12, 20), observed(gradients)
    full = FisherWeightedSVD().compress(weight, stats, 12).to_dense()
    torch.testing.assert_close(full, weight, rtol=1e-7, atol=1e-7)
    silent = torch.zeros_like(weight)
    silent[:, ::3] = weight[:, ::3]
    stats = observed([normal(12, 20) * (torch.arange(20) % 3 > 0)])
    floor = FLOOR * stats[Fisher].mean().mean().item()
    energy = FisherWeightedSVD().options(silent, stats)[0].error
    assert energy == pytest.approx(floor * silent.square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pivot", [False, True])
def test_the_result_has_the_dtype_of_the_weight_and_the_bytes_that_were_promised(dtype, pivot):
    weight, stats, method = normal(12, 20).to(dtype), observed(loud_channels((12, 20))), FisherWeightedSVD(pivot=pivot)
    option = next(option for option in method.options(weight, stats) if option.amount == 6)
    made = method.compress(weight, stats, 6)
    assert made.nbytes() == option.nbytes
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert dense_weight(made).isfinite().all()


def test_what_is_refused():
    weight, stats = normal(12, 20), observed(loud_channels((12, 20)))
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(RecipeError, match=r"fwsvd: alpha"):
            FisherWeightedSVD(alpha=alpha)
    for rank in (0, 13):
        with pytest.raises(RecipeError, match="wanted 1 to 12"):
            FisherWeightedSVD().compress(weight, stats, rank)
    broken = observed([normal(12, 20) * torch.tensor([torch.inf] + [1.0] * 19)])
    for alpha in (0.0, 1.0):
        with pytest.raises(NumericalError, match="gradients have entries that are not finite"):
            FisherWeightedSVD(alpha=alpha).options(weight, broken)
