"""Anchored truncation: the dense output from the shifted input, at the least error that the rank allows."""

import pytest
import torch

from tersely.errors import RecipeError
from tersely.methods.low_rank.aa_svd import AnchoredSVD, anchored_target
from tersely.methods.low_rank.anchored_kfac import AnchoredTwoSidedSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.stats import Cross, Drift, Gram, OutputGram, Stats


def observed(dense: torch.Tensor, shifted: torch.Tensor) -> Stats:
    stats = Stats({Gram: Gram(dense.shape[1]), Cross: Cross(dense.shape[1])})
    for first in range(0, len(dense), 64):
        stats.update(shifted[first : first + 64], dense[first : first + 64])
    return stats


@pytest.fixture
def streams() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    dense = torch.randn(400, 24, generator=generator, dtype=torch.float64) @ mix
    shifted = dense + 0.3 * torch.randn(400, 24, generator=generator, dtype=torch.float64) @ mix.roll(3, 0)
    return torch.randn(16, 24, generator=generator, dtype=torch.float64), dense, shifted


def error(weight: torch.Tensor, kind, dense: torch.Tensor, shifted: torch.Tensor) -> float:
    return (dense @ weight.T - kind(shifted)).square().sum(-1).mean().item()


def test_both_versions_of_the_input_are_told_apart(streams):
    _, dense, shifted = streams
    stats = observed(dense, shifted)
    assert torch.allclose(stats[Gram].mean(), shifted.T @ shifted / 400)
    assert torch.allclose(stats[Cross].mean(), (dense - shifted).T @ shifted / 400)
    assert torch.allclose(stats[Cross].dense(), dense.T @ dense / 400)
    restored = Cross.restore(stats[Cross].state())
    assert torch.equal(restored.mean(), stats[Cross].mean()) and restored.tokens == 400


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("width", [64, 65, 130])
def test_what_has_not_been_shifted_is_not_moved(width, damping):
    """To the bit, in directions that calibration never saw too, and whatever the strips of a Gram matrix are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 20, generator=generator) @ torch.randn(20, width, generator=generator)
    weight = torch.randn(8, width, generator=generator)
    alone = Stats({Gram: Gram(width), Cross: Cross(width)})
    alone.update(x)
    for stats in (observed(x, x), alone):
        assert anchored_target("aa_svd", weight, stats, 1.0, damping) is weight


def test_how_far_inputs_have_shifted_survives_a_loud_channel():
    """In float32, beside a channel that is a thousand times as loud and hardly shifted."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(2048, 32, generator=generator)
    dense[:, 7] += 1000
    shifted = dense + 0.1 * torch.randn(2048, 32, generator=generator)
    exact, stats = observed(dense.double(), shifted.double())[Cross].mean(), observed(dense, shifted)
    scale = shifted.double().square().mean(0).sqrt()  # of the input; the shift is a tenth of 1 in all channels
    assert ((stats[Cross].mean() - exact).abs() / scale).max() < 1e-6


def test_its_error_is_the_dropped_energy_and_the_gap_that_no_rank_closes(streams):
    """Identity 5: Σ_{i>r} σ_i(M)² + ‖W X‖² - ‖M‖² with M = W C L⁻ᵀ."""
    weight, dense, shifted = streams
    stats, method = observed(dense, shifted), AnchoredSVD(damping=0.0)
    root = torch.linalg.cholesky(stats[Gram].mean())
    whole = weight @ (stats[Cross].mean() + stats[Gram].mean()) @ torch.linalg.inv(root).T
    sigma = torch.linalg.svdvals(whole)
    gap = ((weight @ stats[Cross].dense()) * weight).sum() - whole.square().sum()
    for rank in (1, 5, 16):
        wanted = (sigma[rank:].square().sum() + gap).item()
        assert error(weight, method.compress(weight, stats, rank), dense, shifted) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("method", [AnchoredSVD(), AnchoredSVD(pivot=True), AnchoredTwoSidedSVD(residual=0.5)])
def test_only_what_is_stored_is_rounded(streams, method):
    """Of a weight in bfloat16 the target and its truncation are those of float64, and the bytes those of bfloat16."""
    weight, dense, shifted = streams
    stats = observed(dense, shifted) | Stats({OutputGram: OutputGram(16), Drift: Drift(24)})
    half = weight.bfloat16()
    made, wide = (method.compress(w, stats, 5) for w in (half, half.double()))
    assert all(map(torch.equal, made.state_dict().values(), wide.to(torch.bfloat16).state_dict().values()))
    assert [o.nbytes for o in method.options(half, stats)] == [o.nbytes for o in method.sizes((16, 24), 2)]


@pytest.mark.parametrize("rank", [2, 7, 12])
def test_nothing_of_that_rank_comes_closer_to_the_dense_output(streams, rank):
    weight, dense, shifted = streams
    anchored = AnchoredSVD(damping=0.0).compress(weight, observed(dense, shifted), rank)
    best = error(weight, anchored, dense, shifted)
    for other in (dense, shifted):
        whitened = WhitenedSVD(damping=0.0).compress(weight, observed(other, other), rank)
        assert best < error(weight, whitened, dense, shifted)


def test_without_a_shift_or_without_an_anchor_it_is_whitening(streams):
    weight, dense, shifted = streams
    for stats, method in (
        (observed(dense, dense), AnchoredSVD(damping=1e-6)),
        (observed(dense, shifted), AnchoredSVD(anchor=0.0, damping=1e-6)),
    ):
        ours, whitened = method.compress(weight, stats, 6), WhitenedSVD().compress(weight, stats, 6)
        assert torch.equal(ours.to_dense(), whitened.to_dense())


@pytest.mark.parametrize("alpha", [0.25, 1.0, 3.0])
def test_between_the_ends_it_minimises_a_sum_of_two_errors(streams, alpha):
    """SAES-SVD: ‖(W' - W) x̂‖² + α ‖W' x̂ - W x‖² is (1 + α) ‖W' x̂ - W (x̂ + β (x - x̂))‖² and a constant,
    β = α / (1 + α)."""
    weight, dense, shifted = streams
    beta = alpha / (1 + alpha)

    def both(other: torch.Tensor) -> float:
        near, anchored = (shifted @ (other - weight).T, shifted @ other.T - dense @ weight.T)
        return (near.square().sum(-1) + alpha * anchored.square().sum(-1)).mean().item()

    def mixed(other: torch.Tensor) -> float:
        return (shifted @ other.T - (shifted + beta * (dense - shifted)) @ weight.T).square().sum(-1).mean().item()

    stats = observed(dense, shifted)
    best = AnchoredSVD(anchor=beta, damping=0.0).compress(weight, stats, 6).to_dense()
    others = [AnchoredSVD(anchor=anchor, damping=0.0).compress(weight, stats, 6).to_dense() for anchor in (0.0, 1.0)]
    constants = [both(other) - (1 + alpha) * mixed(other) for other in (best, *others, 0 * weight, weight)]
    assert constants == pytest.approx([constants[0]] * 5, rel=1e-9)
    assert all(both(best) < both(other) for other in others)


def test_silent_inputs_and_wrong_fields():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    silent = observed(torch.zeros(10, 8), torch.zeros(10, 8))
    assert torch.isfinite(AnchoredSVD().compress(weight, silent, 3).to_dense()).all()
    for fields in ({"anchor": 1.5}, {"anchor": -0.1}, {"damping": -1.0}):
        with pytest.raises(RecipeError, match="aa_svd"):
            AnchoredSVD(**fields)
