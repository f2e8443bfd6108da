"""Anchored truncation in two metrics: between its parents it is optimal in its own objective, and at the ends it is
them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersely.anatomy import anatomy_of
from tersely.checkpoint import open_source
from tersely.errors import AnatomyError, RecipeError, TerselyError
from tersely.methods.low_rank.aa_svd import AnchoredSVD
from tersely.methods.low_rank.anchored_kfac import AnchoredTwoSidedSVD
from tersely.methods.low_rank.kfac_svd import TwoSidedSVD
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import Calibration, MethodStep, Recipe
from tersely.stats import Cross, Drift, Gram, OutputGram, Stats

EXACT = {"shrink_inputs": 0.0, "shrink_gradients": 0.0}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[(16, 24), (24, 16), (20, 20)], ids=["wide", "tall", "square"])
def case(request) -> tuple[Tensor, Tensor, Tensor, Tensor, Stats]:
    """W, x, x̂, g and what is observed of them."""
    out, width = request.param
    mix = normal(width, width, seed=1)
    dense = normal(500, width, seed=2) @ mix
    shifted = dense + 0.3 * normal(500, width, seed=3) @ mix.roll(3, 0)
    gradients = normal(500, out, seed=4) @ (normal(out, out, seed=5) * torch.logspace(0, -2, out, dtype=torch.float64))
    stats = Stats({Gram: Gram(width), Cross: Cross(width)})
    stats.update(shifted, dense)
    felt = OutputGram(out)
    felt.update(gradients)
    return normal(out, width, seed=6), dense, shifted, gradients, stats | Stats({OutputGram: felt})


def lost(weight: Tensor, made: Tensor, case: tuple, anchor: float) -> float:
    """E‖L_Rᵀ (W y - W' x̂)‖²."""
    _, dense, shifted, gradients, _ = case
    target = (shifted + anchor * (dense - shifted)) @ weight.T
    root = torch.linalg.cholesky(gradients.T @ gradients / len(gradients))
    return ((target - shifted @ made.T) @ root).square().sum(1).mean().item()


@pytest.mark.parametrize("anchor", [0.5, 1.0])
def test_its_error_is_the_least_possible_and_the_dropped_energy(case, anchor):
    weight, dense, shifted, _, stats = case
    method = AnchoredTwoSidedSVD(anchor=anchor, damping=0.0, **EXACT)
    target = (shifted + anchor * (dense - shifted)) @ weight.T
    best = torch.linalg.lstsq(shifted, target).solution.T
    least = lost(weight, best, case, anchor)
    for option in method.options(weight, stats)[1:]:
        made = method.compress(weight, stats, option.amount).to_dense()
        assert lost(weight, made, case, anchor) == pytest.approx(least + option.error, rel=1e-6)


@pytest.mark.parametrize("residual", [0.5, 1.0])
def test_what_writes_to_the_stream_makes_up_for_its_drift(case, residual):
    """The least error in W y + residual (h - ĥ), and the dropped energy on top."""
    weight, dense, shifted, gradients, stats = case
    drift = dense @ normal(dense.shape[1], len(weight), seed=7) + normal(len(dense), len(weight), seed=8)
    seen = Stats({Drift: Drift(dense.shape[1])})
    seen.update(shifted, dense, drift)
    method = AnchoredTwoSidedSVD(0.5, residual=residual, damping=0.0, **EXACT)
    target = (shifted + dense) / 2 @ weight.T + residual * drift
    root = torch.linalg.cholesky(gradients.T @ gradients / len(gradients))

    def missed(made: Tensor) -> float:
        return ((target - shifted @ made.T) @ root).square().sum(1).mean().item()

    least = missed(torch.linalg.lstsq(shifted, target).solution.T)
    for option in method.options(weight, stats | seen)[1:]:
        made = method.compress(weight, stats | seen, option.amount).to_dense()
        assert missed(made) == pytest.approx(least + option.error, rel=1e-6)
    nothing_drifted = Stats({Drift: Drift(dense.shape[1])})
    without = AnchoredTwoSidedSVD(0.5, damping=0.0, **EXACT).compress(weight, stats, 5).to_dense()
    assert torch.equal(method.compress(weight, stats | nothing_drifted, 5).to_dense(), without)
    assert torch.equal(method.compress(weight, stats, 5).to_dense(), without)  # of the dense model nobody gathers it


@pytest.mark.parametrize("rank", [2, 7, 12])
def test_nothing_of_that_rank_does_better_in_its_objective(case, rank):
    weight, *_, stats = case
    ours = lost(
        weight, AnchoredTwoSidedSVD(1.0, damping=0.0, **EXACT).compress(weight, stats, rank).to_dense(), case, 1
    )
    for other in (AnchoredSVD(damping=0.0), TwoSidedSVD(**EXACT), AnchoredTwoSidedSVD(0.5, damping=0.0, **EXACT)):
        assert ours <= lost(weight, other.compress(weight, stats, rank).to_dense(), case, 1) * (1 + 1e-12)
    around = torch.linalg.svd(AnchoredSVD(damping=0.0).compress(weight, stats, rank).to_dense() + 1e-3)
    nearby = around.U[:, :rank] * around.S[:rank] @ around.Vh[:rank]
    assert ours <= lost(weight, nearby, case, 1)


@pytest.mark.parametrize("pivot", [False, True])
def test_at_the_ends_it_is_its_parents(case, pivot):
    weight, *_, stats = case
    two_sided = TwoSidedSVD(pivot=pivot).compress(weight, stats, 5).to_dense()
    assert torch.equal(AnchoredTwoSidedSVD(0.0, pivot=pivot).compress(weight, stats, 5).to_dense(), two_sided)
    anchored = AnchoredSVD(damping=0.0, pivot=pivot).compress(weight, stats, 5).to_dense()
    alike = AnchoredTwoSidedSVD(1.0, shrink_inputs=0.0, shrink_gradients=1.0, damping=0.0, pivot=pivot)
    assert torch.allclose(alike.compress(weight, stats, 5).to_dense(), anchored, rtol=1e-7, atol=1e-9)


def test_on_dense_inputs_it_is_two_sided(case):
    weight, dense, _, _, stats = case
    same = Stats({Gram: Gram(dense.shape[1]), Cross: Cross(dense.shape[1])})
    same.update(dense)
    same |= Stats({OutputGram: stats[OutputGram]})
    ours, theirs = AnchoredTwoSidedSVD(), TwoSidedSVD()
    assert [o.error for o in ours.options(weight, same)] == [o.error for o in theirs.options(weight, same)]
    assert torch.equal(ours.compress(weight, same, 3).to_dense(), theirs.compress(weight, same, 3).to_dense())


@pytest.mark.parametrize(
    "wrong", [{"anchor": 1.5}, {"residual": 2}, {"shrink_inputs": -0.1}, {"shrink_gradients": 2}, {"damping": -1}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(RecipeError, match="anchored_kfac"):
        AnchoredTwoSidedSVD(**wrong)


@pytest.fixture
def recipe(model_folder: Callable[..., Path], text_file: Path) -> Callable[..., Recipe]:
    def make(family: str, propagate: Any = "input", residual: float = 1.0) -> Recipe:
        options = {"residual": residual, "pivot": True}
        step = MethodStep("anchored_kfac", keep=0.6, allocate="uniform", propagate=propagate, options=options)
        return Recipe(str(model_folder(family)), [step], Calibration([str(text_file)], 8, 16))

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_the_first_to_repair_the_stream_is_what_the_first_mlp_writes(family, recipe, tmp_path):
    """Before the first attention nothing has drifted; where the MLP reads the same stream, before it neither."""
    sources = []
    for residual in (0.0, 1.0):
        run(prepare(recipe(family, residual=residual), tmp_path / str(residual)))
        sources.append(open_source(tmp_path / str(residual)))
    changed = [name for name in sources[0].stored if not torch.equal(*(source.tensor(name) for source in sources))]
    anatomy = anatomy_of(sources[0].skeleton())
    (place,) = (place.name for place in anatomy.places if place.block == 0 and place.role == "mlp.down")
    here = [name for name in changed if name.startswith(f"{anatomy.blocks[0]}.")]
    assert bool(here) == (family != "gpt_neox") and all(name.startswith(f"{place}.") for name in here)
    assert len(changed) > len(here)


@pytest.mark.parametrize("propagate", ["none", "block"])
def test_drift_that_is_not_observed_is_refused(propagate, recipe, tmp_path):
    with pytest.raises(RecipeError, match='set propagate = "input", or residual = 0'):
        prepare(recipe("llama", propagate), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("later", "match"), [
    ({"propagate": "block", "target": ["*.down"]}, r'set propagate = "input"'),
    ({"target": ["*.down"]}, r"none of the targets is a linear that writes to it"),
])  # fmt: skip
def test_in_a_later_step_too_and_before_any_work(later, match, recipe, tmp_path):
    asked = recipe("llama")
    steps = [MethodStep("svd_llm", keep=0.8), replace(asked.step[0], **later)]
    with pytest.raises(TerselyError, match=match):
        prepare(replace(asked, step=steps), tmp_path / "out")


def test_a_stream_that_linears_do_not_write_to_themselves_is_refused(recipe, tmp_path):
    with pytest.raises(AnatomyError, match=r"it norms what attention and MLP add.*set residual = 0"):
        prepare(recipe("gemma2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_targets_that_do_not_write_to_the_stream_are_refused(recipe, tmp_path):
    asked = recipe("llama")
    with pytest.raises(AnatomyError, match=r"none of the targets is a linear that writes to it; set residual = 0"):
        prepare(replace(asked, step=[replace(asked.step[0], target=["mlp.up", "attention.q"])]), tmp_path / "out")
