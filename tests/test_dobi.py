"""Derivatives through truncation, and the projection that truncated windows have in common.

The letters are those of the papers' claims: (a) gradients are the true ones, and finite where singular values meet;
(b) the derivative in a truncation position; (c) a soft gate becomes a truncation; (d) no weight truncates a window as
well as the window's own truncation does, nor all windows as well as whitening; (e) the update is a projection of rank
k.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersely import calibrate, gating
from tersely.errors import NumericalError, RecipeError
from tersely.gating import gates_at
from tersely.journal import read_tensors
from tersely.kinds import LowRankLinear
from tersely.linalg.stable_svd import FLOOR, NEAR, ORDER, gated, inverse_gaps, stable_svd
from tersely.linalg.truncation import output_basis
from tersely.methods.low_rank.dobi import DobiSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.pipeline import load, run
from tersely.prepare import prepare
from tersely.recipe import Calibration, MethodStep, Recipe
from tersely.stats import Gram, Stats, WindowFactors
from tersely.stats.windows import KEPT

SHAPES = {"wide": (4, 7), "tall": (7, 4), "square": (5, 5)}
APART = (3.0, 2.0, 1.2, 0.5, 0.2)

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(shape: tuple[int, int], values: tuple[float, ...], seed: int = 0) -> Tensor:
    k = min(shape)
    u, v = (torch.linalg.qr(normal(side, k, seed=seed + side)).Q for side in shape)
    return (u * torch.tensor(values[:k], dtype=torch.float64)) @ v.T


def differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient of a scalar function, entry by entry."""
    found = torch.zeros_like(at)
    for place in range(at.numel()):
        change = torch.zeros_like(at)
        change.view(-1)[place] = step
        found.view(-1)[place] = (function(at + change) - function(at - change)) / (2 * step)
    return found


# --- (a) gradients ----------------------------------------------------------------------------------------------------


def parts_that_know_no_sign(matrix: Tensor) -> Tensor:
    """Everything that a decomposition says, in forms that do not depend on the signs of vectors."""
    u, s, vh = stable_svd(matrix)
    sign = torch.sign(u.detach()[0])
    other = torch.cos(torch.arange(u.numel(), dtype=torch.float64)).view_as(u)
    third = torch.sin(torch.arange(vh.numel(), dtype=torch.float64)).view_as(vh)
    return (
        (s**3).sum()
        + (u * sign * other).sum()
        + (vh * sign[:, None] * third).sum()
        + (u @ (s.sqrt()[:, None] * vh)).sum()
    )


@every_shape
def test_the_svd_has_the_gradient_that_differences_have(shape):
    matrix = with_spectrum(shape, APART).requires_grad_()
    assert torch.autograd.gradcheck(parts_that_know_no_sign, (matrix,), atol=1e-4)
    (found,) = torch.autograd.grad(parts_that_know_no_sign(matrix), matrix)
    torch.testing.assert_close(found, differences(parts_that_know_no_sign, matrix.detach()), rtol=1e-5, atol=1e-6)


@every_shape
def test_it_agrees_with_the_library_where_that_is_defined(shape):
    matrix = torch.stack([with_spectrum(shape, APART, seed) for seed in range(3)]).requires_grad_()

    def loss(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        u, s, vh = parts
        kept = u[..., :2] @ (s[..., :2, None] * vh[..., :2, :])
        return (kept.sin() * normal(*kept.shape, seed=4)).sum()

    (ours,) = torch.autograd.grad(loss(stable_svd(matrix)), matrix)
    (library,) = torch.autograd.grad(loss(torch.linalg.svd(matrix, full_matrices=False)), matrix)
    torch.testing.assert_close(ours, library, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("values", [(2.0, 2.0, 2.0, 1.0, 1.0), (2.0, 2.0 - 1e-11, 1.0, 1.0, 0.0), (0.0,) * 5])
@every_shape
def test_equal_singular_values_leave_every_gradient_finite_and_capped(shape, values):
    matrix = with_spectrum(shape, values).requires_grad_()
    u, s, vh = stable_svd(matrix)
    (found,) = torch.autograd.grad(
        (u * normal(*u.shape)).sum() + s.sum() + (vh * normal(*vh.shape, seed=1)).sum(), matrix
    )
    assert found.isfinite().all()


def test_gaps_are_inverted_as_the_paper_says():
    values = torch.tensor([2.0, 2.0, 2.0 - 1e-11, 1.0, 1e-12, 0.0], dtype=torch.float64)
    gaps = inverse_gaps(values)
    assert torch.equal(gaps, -gaps.T) and not gaps.diagonal().any()
    assert gaps[1, 0].item() == pytest.approx((ORDER + 1) / 4)  # exactly equal
    q = values[2] / values[0]
    assert gaps[2, 0].item() == pytest.approx(((1 - q ** (2 * ORDER + 2)) / (1 - q**2) / 4).item(), rel=1e-4)
    assert gaps[3, 0].item() == pytest.approx(1 / 3)
    assert gaps[5, 4].item() == 100  # both at the floor
    assert gaps[4, 3].item() == pytest.approx(1 / (1 - FLOOR**2))


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None, database=None)
def test_an_inverted_gap_never_exceeds_what_its_distance_allows(values):
    falling = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    gaps = inverse_gaps(falling)
    assert gaps.isfinite().all() and torch.equal(gaps, -gaps.mT)
    larger = torch.maximum(falling[:, None], falling).clamp(min=FLOOR)
    assert (gaps.abs() <= torch.maximum((ORDER + 1) / larger.square(), 1 / (NEAR * larger)) * (1 + 1e-9)).all()


@every_shape
@pytest.mark.parametrize(
    "values",
    [APART, (2.0, 2.0, 1.0, 1.0, 1.0), (2.0, 2.0 - 1e-12, 1.0, 1.0 - 1e-11, 1.0 - 1e-11)],
    ids=["apart", "equal", "near"],
)
def test_a_gated_matrix_has_the_true_gradient_wherever_equal_values_have_equal_gates(shape, values):
    matrix = with_spectrum(shape, values).requires_grad_()
    gates = torch.tensor((0.9, 0.9, 0.3, 0.3, 0.3), dtype=torch.float64)[: min(shape)].requires_grad_()
    weights = normal(*shape, seed=8)

    def loss(y: Tensor, t: Tensor | None = None) -> Tensor:
        return (gated(y, gates.detach() if t is None else t).sin() * weights).sum()

    (in_matrix, in_gates) = torch.autograd.grad(loss(matrix, gates), (matrix, gates))
    torch.testing.assert_close(in_matrix, differences(loss, matrix.detach()), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        in_gates, differences(lambda t: loss(matrix.detach(), t), gates.detach()), rtol=1e-5, atol=1e-7
    )


@every_shape
def test_a_gated_batch_is_its_matrices(shape):
    batch = torch.stack([with_spectrum(shape, APART, seed) for seed in range(3)]).requires_grad_()
    gates = torch.linspace(1, 0.1, min(shape), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gated, (batch, gates))
    torch.testing.assert_close(gated(batch, gates), torch.stack([gated(one, gates) for one in batch]))


@every_shape
def test_gates_of_one_are_the_matrix_and_its_gradient(shape):
    matrix = normal(*shape).requires_grad_()
    y = gated(matrix, torch.ones(min(shape), dtype=torch.float64))
    torch.testing.assert_close(y, matrix, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad((y * normal(*shape, seed=1)).sum(), matrix)
    torch.testing.assert_close(found, normal(*shape, seed=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_any_scale_are_survived(scale, dtype):
    matrix = (normal(6, 4) * scale).to(dtype).requires_grad_()
    y = gated(matrix, torch.tensor([1.0, 1.0, 0.5, 0.0]))
    assert y.dtype == dtype and y.isfinite().all()
    (found,) = torch.autograd.grad(y.sum(), matrix)
    assert found.dtype == dtype and found.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    matrix = normal(4, 3)
    matrix[1, 1] = bad
    with pytest.raises(NumericalError, match="not finite"):
        stable_svd(matrix)
    with pytest.raises(NumericalError, match="not finite"):
        gated(matrix, torch.ones(3, dtype=torch.float64))


# --- (b), (c) positions -----------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("at", [0.3, 1.7, 2.45, 3.0])
def test_the_derivative_in_a_position_is_the_papers(shape, at):
    """Σ (u_iᵀ g v_i) σ_i ½ β (1 - tanh²(β (γ - i + ½)))."""
    matrix, upstream, position = (
        with_spectrum(shape, APART),
        normal(*shape, seed=3),
        torch.tensor(at, dtype=torch.float64),
    )
    k = min(shape)
    position.requires_grad_()
    (found,) = torch.autograd.grad((gated(matrix, gates_at(position, k)) * upstream).sum(), position)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    numbers = torch.arange(1, k + 1, dtype=torch.float64)
    steep = gating.SHARPNESS / 2 * (1 - torch.tanh(gating.SHARPNESS * (at - numbers + 0.5)) ** 2)
    wanted = ((u.T @ upstream @ vh.T).diagonal() * s * steep).sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)

    def loss(of: Tensor) -> Tensor:
        return (gated(matrix, gates_at(of, k)) * upstream).sum()

    assert found.item() == pytest.approx(differences(loss, position.detach()).item(), rel=1e-5, abs=1e-7)


def test_as_many_gates_are_open_as_the_position_says():
    for position in (5.0, 6.4, 7.5, 10.0):
        gates = gates_at(torch.tensor(position, dtype=torch.float64), 100)
        assert gates.sum().item() == pytest.approx(position, abs=0.01)
        assert (gates.diff() <= 0).all() and ((gates >= 0) & (gates <= 1)).all()


@every_shape
def test_a_steep_gate_truncates(shape, monkeypatch):
    matrix, k = with_spectrum(shape, APART), min(shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for kept in range(k + 1):
        hard, gaps = u[:, :kept] @ (s[:kept, None] * vh[:kept]), []
        for sharpness in (1.0, 4.0, 16.0, 64.0):
            monkeypatch.setattr(gating, "SHARPNESS", sharpness)
            soft = gated(matrix, gates_at(torch.tensor(float(kept), dtype=torch.float64), k))
            gaps.append((soft - hard).norm().item())
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-12


# --- (d), (e) the update ----------------------------------------------------------------------------------------------

LAYERS = {"wide": (10, 24), "tall": (24, 10), "square": (16, 16)}
every_layer = pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)


def windows_of(width: int, count: int = 6, tokens: int = 40) -> list[Tensor]:
    """Loud and quiet windows, each with directions of its own."""
    return [
        normal(tokens, width, seed=10 + i)
        * torch.logspace(0, -1.5, width, dtype=torch.float64)
        @ normal(width, width, seed=30 + i)
        * 3.0**-i
        for i in range(count)
    ]


def observed(windows: list[Tensor]) -> Stats:
    stats = Stats({Gram: Gram(windows[0].shape[1]), WindowFactors: WindowFactors(windows[0].shape[1])})
    for window in windows:
        stats.update(window)
    return stats


def output_error(weight: Tensor, other: Tensor, windows: list[Tensor]) -> float:
    rows = torch.cat(windows)
    return (rows @ (weight - other).T).square().sum(1).mean().item()


@every_layer
def test_a_window_is_truncated_best_by_itself(shape):
    weight, windows = normal(*shape), windows_of(shape[1])
    stats = observed(windows)
    for rank in (1, 3, 7):
        update = DobiSVD().compress(weight, stats, rank).to_dense()
        for window in windows:
            outputs = window @ weight.T
            gates = (torch.arange(min(outputs.shape)) < rank).double()
            own = (outputs - gated(outputs, gates)).norm()
            assert own <= (outputs - window @ update.T).norm() * (1 + 1e-9)


@every_layer
def test_no_update_beats_whitening_on_its_own_inputs(shape):
    weight, windows = normal(*shape), windows_of(shape[1])
    stats, better = observed(windows), 0
    for method in (DobiSVD(damping=0), DobiSVD(damping=0, weighted=True), DobiSVD(damping=0, incremental=True)):
        for option in method.options(weight, stats)[1:]:
            whitened = WhitenedSVD(damping=0).compress(weight, stats, option.amount).to_dense()
            least = output_error(weight, whitened, windows)
            update = output_error(weight, method.compress(weight, stats, option.amount).to_dense(), windows)
            whole = output_error(weight, 0 * weight, windows)
            assert update >= least - 1e-10 * whole
            assert update == pytest.approx(option.error, rel=1e-6, abs=1e-9 * whole)
            better += least < 0.9 * update
    assert better, "nothing was told apart"


@every_layer
def test_with_one_window_it_is_whitening(shape):
    weight, stats = normal(*shape), observed(windows_of(shape[1])[:1])
    for rank in (1, 4, min(shape) - 1):
        made = [method(damping=0).compress(weight, stats, rank).to_dense() for method in (DobiSVD, WhitenedSVD)]
        torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-8)


@every_layer
def test_weighted_and_uncut_it_is_whitening_of_the_sample(shape):
    """The scatter of all of V Σ is that of the outputs."""
    weight, windows = normal(*shape), windows_of(shape[1])
    stats = observed(windows)
    method, rank = DobiSVD(damping=0, weighted=True), min(shape)
    whole = method.compress(weight, stats, rank).to_dense()
    torch.testing.assert_close(whole, weight, rtol=0, atol=1e-8)


@every_layer
def test_the_update_projects_onto_the_span_of_most_windows(shape):
    """By definition: eigenvectors of Σ V Vᵀ over the windows' leading right singular vectors."""
    weight, windows = normal(*shape), windows_of(shape[1])
    stats = observed(windows)
    for rank in (1, 3, 6):
        stacked = torch.cat([torch.linalg.svd(x @ weight.T, full_matrices=False).Vh[:rank] for x in windows])
        _, _, directions = torch.linalg.svd(stacked, full_matrices=False)
        span = directions[:rank].T
        torch.testing.assert_close(span.T @ span, torch.eye(rank, dtype=torch.float64))
        made = DobiSVD().compress(weight, stats, rank).to_dense()
        torch.testing.assert_close(made, span @ span.T @ weight, rtol=0, atol=2e-4)
        assert torch.linalg.matrix_rank(made) == rank


def test_short_windows_give_as_many_directions_as_they_have():
    """Four tokens of a weight with sixteen directions: a quarter of the rank from every window."""
    weight, windows = normal(16, 16), windows_of(16, count=8, tokens=4)
    stats = observed(windows)
    stacked = torch.cat([torch.linalg.svd(x @ weight.T, full_matrices=False).Vh[:2] for x in windows])
    span = torch.linalg.svd(stacked, full_matrices=False).Vh[:8].T
    made = DobiSVD().compress(weight, stats, 8).to_dense()
    torch.testing.assert_close(made, span @ span.T @ weight, rtol=0, atol=5e-4)


def test_incremental_components_are_those_of_the_papers_update():
    """[diag(s) C; V; √(n m / (n + m)) (mean - mean of V)], decomposed and cut, window after window."""
    weight, windows = normal(10, 24), windows_of(24)
    stats, rank = observed(windows), 3
    signed = []
    for factor in stats[WindowFactors].factors():
        v = torch.linalg.svd(factor @ weight.T, full_matrices=False).Vh[:rank]
        signed.append(v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign())
    for centre in (False, True):
        mean, count, kept = torch.zeros(10, dtype=torch.float64), 0, torch.zeros(0, 10, dtype=torch.float64)
        for rows in signed:
            of_rows = rows.mean(0) if centre else torch.zeros_like(mean)
            shift = (count * len(rows) / (count + len(rows))) ** 0.5 * (mean - of_rows)
            _, s, vh = torch.linalg.svd(torch.cat([kept, rows - of_rows, shift[None]]), full_matrices=False)
            kept = s[:rank, None] * vh[:rank]
            mean = (count * mean + len(rows) * of_rows) / (count + len(rows))
            count += len(rows)
        span = torch.linalg.svd(kept, full_matrices=False).Vh.T
        made = DobiSVD(incremental=True, centre=centre).compress(weight, stats, rank).to_dense()
        torch.testing.assert_close(made, span @ span.T @ weight, rtol=0, atol=1e-3)


def test_one_piece_or_many_the_scatter_about_the_mean_is_the_same():
    weight, stats = normal(10, 24), observed(windows_of(24))
    rank = 4
    stacked = []
    for factor in stats[WindowFactors].factors():
        v = torch.linalg.svd(factor @ weight.T, full_matrices=False).Vh[:rank]
        stacked.append(v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign())
    rows = torch.cat(stacked)
    span = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:rank].T
    made = DobiSVD(centre=True).compress(weight, stats, rank).to_dense()
    torch.testing.assert_close(made, span @ span.T @ weight, rtol=0, atol=1e-3)
    options = {o.amount: o.error for o in DobiSVD(centre=True, damping=0).options(weight, stats)}
    assert options[rank] == pytest.approx(output_error(weight, made, windows_of(24)), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("remap", [False, True])
def test_the_unit_of_the_inputs_does_not_matter(scale, remap):
    weight, windows = normal(10, 24), windows_of(24)
    method = DobiSVD(remap=remap)
    plain, scaled = (method.compress(weight, observed([x * by for x in windows]), 5).to_dense() for by in (1.0, scale))
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-6)


def test_few_ranks_are_spread_over_those_that_make_a_weight_smaller():
    _, *sizes = DobiSVD(ranks=8).sizes((300, 257), 2)
    assert [o.amount for o in sizes] == [18, 35, 52, 69, 87, 104, 121, 138]
    assert sizes[-1].nbytes < 300 * 257 * 2
    _, *sizes = DobiSVD(ranks=4, remap=True).sizes((300, 256), 2)
    assert [o.amount for o in sizes] == [64, 128, 192, 256]


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"ranks": 0}, "ranks 0"), ({"damping": -1.0}, "damping"), ({"pivot": True, "remap": True}, "pivot and remap")],
)
def test_what_cannot_be_asked_is_refused(asked, said):
    with pytest.raises(RecipeError, match=said):
        DobiSVD(**asked)


# --- the sample -------------------------------------------------------------------------------------------------------


def test_a_factor_answers_like_its_window():
    (window,) = windows_of(12, count=1)
    statistic = WindowFactors(12)
    statistic.update(window)
    (factor,) = statistic.factors()
    assert factor.shape == (12, 12)
    torch.testing.assert_close(factor.T @ factor, window.T @ window, rtol=1e-12, atol=1e-12)
    basis = output_basis(normal(5, 12), window.T @ window)
    torch.testing.assert_close(torch.linalg.svdvals(factor @ normal(5, 12).T).square(), basis.energy)


def test_the_sample_is_bounded_and_does_not_depend_on_the_order():
    windows = [normal(3, 5, seed=seed) for seed in range(2 * KEPT)]
    forwards, backwards, left, right = (WindowFactors(5) for _ in range(4))
    for window in windows:
        forwards.update(window)
    for window in reversed(windows):
        backwards.update(window)
    for number, window in enumerate(windows):
        (left if number % 3 else right).update(window)
    left.merge(right)
    assert len(forwards.factors()) == KEPT and forwards.tokens == left.tokens == 6 * KEPT
    for other in (backwards, left):
        assert torch.equal(torch.cat(other.factors()), torch.cat(forwards.factors()))


def test_windows_are_told_apart_in_a_batch():
    batch, stats = torch.stack(windows_of(6, count=4)), Stats({Gram: Gram(6), WindowFactors: WindowFactors(6)})
    stats.update(batch)
    assert len(stats[WindowFactors].factors()) == 4
    torch.testing.assert_close(stats[WindowFactors].mean(), stats[Gram].mean())


def test_no_tokens_are_no_window():
    stats = Stats({Gram: Gram(6), WindowFactors: WindowFactors(6)})
    stats.update(torch.zeros(0, 6, dtype=torch.float64))
    assert stats[WindowFactors].factors() == [] and stats.tokens == 0


# --- in a run ---------------------------------------------------------------------------------------------------------


def recipe(model: Path, text: Path, **asked: Any) -> Recipe:
    return Recipe(str(model), [MethodStep("dobi", **({"keep": 0.6} | asked))], Calibration([str(text)], 8, 16))


@pytest.mark.parametrize("batch", [16, 48, 4096])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_calibration_shows_one_window_after_the_other(family, batch, model_folder, text_file, tmp_path, monkeypatch):
    """However many run together, and where an MLP reads all their tokens as one matrix."""
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", batch)
    asked = recipe(model_folder(family), text_file, propagate="none")
    run(prepare(asked, tmp_path / "out"), statistics=tmp_path / "statistics")
    files = sorted((tmp_path / "statistics").glob("*/*.window_factors.safetensors"))
    assert len(files) == 2
    for path in files:
        state = read_tensors(path)
        for name, lengths in state.items():
            if name.endswith("|lengths"):
                assert lengths.tolist() == [16] * 8


@pytest.mark.parametrize("propagate", ["none", "block", "input"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_ends_in_a_model_that_opens_with_the_error_that_is_reported(
    propagate, family, model_folder, text_file, tmp_path
):
    asked = recipe(model_folder(family), text_file, propagate=propagate, allocate="greedy")
    result = run(prepare(asked, tmp_path / "out"))
    found = [module for module in load(tmp_path / "out").modules() if isinstance(module, LowRankLinear)]
    cut = [row for row in result.report.sites if row.amount is not None]
    assert len(found) == len(cut) > 0
    if propagate == "none":
        for row in cut:
            assert row.predicted_error == pytest.approx(row.measured_error, rel=1e-3, abs=1e-5)
