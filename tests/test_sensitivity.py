"""What cutting one site does to the model is measured as defined, once, and the model is left as it was."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tersely import journal, planning, predictions, sensitivity
from tersely.allocate import ALLOCATORS, Measures, Plan, curve_of
from tersely.anatomy import anatomy_of
from tersely.calibrate import Blocks
from tersely.checkpoint import open_source
from tersely.errors import NumericalError, RecipeError
from tersely.journal import Journal
from tersely.kinds import DenseLinear
from tersely.methods.low_rank.svd import PlainSVD
from tersely.option import Option
from tersely.pipeline import run
from tersely.prepare import examine, prepare
from tersely.recipe import CacheStep, Calibration, MethodStep, Recipe
from tersely.sensitivity import SKIPPED, TEMPERATURE, WINDOWS, Laboratory
from tersely.stats import Stats
from tersely.targets import SiteTarget

OF_BLOCKS = ("similarity", "spikes")
"""What is measured block by block, whatever the method."""

MEASURING = sorted(name for name, allocator in ALLOCATORS.items() if allocator.measures and not allocator.learns)


def windows_of(count: int = 5, length: int = 16) -> Tensor:
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def laboratory(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Laboratory]:
    """A function: what is measured, family → a laboratory with a journal of its own."""
    made = []

    def make(measured: str, family: str = "llama", windows: Tensor | None = None, **settings: Any) -> Laboratory:
        source = open_source(model_folder(family, **settings))
        anatomy = anatomy_of(source.skeleton())
        own = Journal(tmp_path / f"run-{len(made)}", "recipe")
        own.begin()
        made.append(own)
        windows = windows_of() if windows is None else windows
        return Laboratory(source, anatomy, windows, "cpu", own, None, measured)

    return make


def target_in(laboratory: Laboratory, number: int) -> SiteTarget:
    return SiteTarget(laboratory._anatomy.sites[number], PlainSVD())


def logits_with(folder: Path, replaced: dict[str, Tensor], windows: Tensor) -> Tensor:
    """Of a model opened by its library, with some weights replaced by [out, in] matrices."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, weight in replaced.items():
        module = model.get_submodule(name)
        turned = weight.T if module.weight.shape != weight.shape or "Conv1D" in type(module).__name__ else weight
        module.weight.data = turned.to(module.weight.dtype).contiguous()
    with torch.no_grad():
        return model(windows).logits.double()


def harm_by_definition(measured: str, dense: Tensor, present: Tensor, windows: Tensor) -> float:
    length = windows.shape[1]
    if measured == "kl":
        p, q = ((of / TEMPERATURE).log_softmax(-1)[:, length // SKIPPED : length - 1] for of in (dense, present))
        return (p.exp() * (p - q)).sum(-1).mean().item()
    losses = [-of.log_softmax(-1)[:, :-1].gather(-1, windows[:, 1:, None]).mean().item() for of in (dense, present)]
    return losses[1] - losses[0]


# gpt2 has transposed weights, qwen2 biases, gemma2 caps its logits behind the head
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("measured", ["kl", "loss"])
def test_harm_is_what_its_definition_says(measured, family, laboratory, model_folder):
    measuring = laboratory(measured, family)
    folder, windows = model_folder(family), windows_of()
    dense = logits_with(folder, {}, windows)
    for number in (0, 5):
        target = target_in(measuring, number)
        stored = measuring._source.tensor(f"{target.name}.weight")
        weight = stored.T if target.site.transposed else stored
        options = [Option(2, 11, 0.0), Option(1, 7, 0.0)]
        harm = measuring.harm(number, target, {}, options)
        assert list(harm) == [11, 7]
        for option in options:
            cut = PlainSVD().compress(weight, Stats(), option.amount).to_dense()
            wanted = harm_by_definition(measured, dense, logits_with(folder, {target.name: cut}, windows), windows)
            assert abs(wanted) > 1e-5, "a test that tells nothing"
            assert harm[option.nbytes] == pytest.approx(wanted, rel=2e-3, abs=2e-7)


@pytest.mark.parametrize("measured", ["kl", "loss"])
def test_the_model_is_as_before_whatever_was_measured(measured, laboratory):
    """Also where compressing fails, and where the model breaks."""
    measuring = laboratory(measured)
    options, target = [Option(1, 7, 0.0)], target_in(measuring, 3)
    first = measuring.harm(0, target, {}, options)
    measuring.harm(1, target_in(measuring, 0), {}, options)
    with pytest.raises(NumericalError, match="not finite"):
        measuring.harm(2, Broken(target.site, PlainSVD()), {}, options)
    assert measuring.harm(3, target, {}, options) == first


class Broken(SiteTarget):
    def compress(self, weights: Any, biases: Any, stats: Any, amount: Any) -> Any:
        return {self.name: DenseLinear.from_weight(torch.full_like(weights[self.name], math.nan), None)}


@pytest.mark.parametrize("measured", ["kl", "loss"])
def test_nothing_done_does_no_harm(measured, laboratory):
    measuring = laboratory(measured)
    target = target_in(measuring, 2)
    rank = min(target.site.out_features, target.site.in_features)
    assert measuring.harm(0, target, {}, [Option(rank, 7, 0.0)])[7] == pytest.approx(0, abs=1e-6)


def test_heads_asked_piece_by_piece_say_the_same(laboratory, monkeypatch):
    whole = [laboratory(m).harm(0, target_in(laboratory(m), 1), {}, [Option(1, 7, 0.0)])[7] for m in ("kl", "loss")]
    monkeypatch.setattr(predictions, "LOGITS_AT_ONCE", 900)
    monkeypatch.setattr(predictions, "TOKENS_AT_ONCE", 32)
    pieces = [laboratory(m).harm(0, target_in(laboratory(m), 1), {}, [Option(1, 7, 0.0)])[7] for m in ("kl", "loss")]
    assert pieces == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_similarity_is_the_mean_cosine_of_what_goes_in_and_out(family, laboratory, model_folder):
    measuring = laboratory("similarity", family)
    model, seen = AutoModelForCausalLM.from_pretrained(model_folder(family)).eval(), {}
    for name in measuring._anatomy.blocks:

        def note(block: Any, read: Any, out: Any, name: str = name) -> None:
            out = out[0] if isinstance(out, tuple) else out
            seen[name] = torch.cosine_similarity(read[0].double(), out.double(), dim=-1).mean().item()

        model.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        model(windows_of())
    found = measuring.similarity(Blocks(measuring._source, measuring._anatomy, "cpu"))
    assert found == pytest.approx(list(seen.values()), rel=1e-5)


def test_many_windows_are_thinned_from_end_to_end(laboratory):
    windows = windows_of(3 * WINDOWS)
    read = laboratory("kl", windows=windows)._windows
    assert len(read) == WINDOWS
    assert torch.equal(read[0], windows[0]) and torch.equal(read[-1], windows[-1])


def test_what_cannot_be_measured_is_refused(laboratory, model_folder):
    with pytest.raises(RecipeError, match="calibration text"):
        laboratory("kl", windows=torch.zeros(4, 1, dtype=torch.long))
    headless = laboratory("kl", "llama", architecture="LlamaModel")
    with pytest.raises(RecipeError, match="no head"):
        headless.harm(0, target_in(headless, 0), {}, [Option(1, 7, 0.0)])


def test_data_free_methods_read_text_for_these_allocators(model_folder, text_file, tmp_path):
    recipe = Recipe(str(model_folder()), [MethodStep("svd", keep=0.5, allocate="lems")], Calibration([str(text_file)]))
    found = examine(recipe, tmp_path)
    assert found.calibrated and not found.objects[0].needs


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(model_folder: Callable[..., Path], text_file: Path) -> Callable[..., Recipe]:
    def make(allocate: str, **settings: Any) -> Recipe:
        step = MethodStep("svd_llm", **({"keep": 0.6, "propagate": "none"} | settings), allocate=allocate)
        return Recipe(str(model_folder()), [step], Calibration([str(text_file)], 4, 16))

    return make


@pytest.mark.parametrize("allocate", MEASURING)
def test_a_run_hands_over_what_was_measured(allocate, recipe, tmp_path, monkeypatch):
    """For every target with something to choose; and it makes a difference."""
    seen = []
    entry = ALLOCATORS[allocate]

    def divide(curves: Any, budget: int, measures: Measures) -> Any:
        seen.append((curves, measures))
        return entry.rule(curves, budget, measures)

    monkeypatch.setitem(ALLOCATORS, allocate, replace(entry, rule=divide))
    run(prepare(recipe(allocate), tmp_path / "out"))
    curves, measures = seen[-1]
    sites = {curve.site for curve in curves}
    assert {curve.role for curve in curves} >= {"attention.q", "mlp.down"}
    if entry.measures == "similarity":
        assert measures.similarity.keys() == sites and not measures.harm
        assert len(set(measures.similarity.values())) == 2, "one for each block"
    elif entry.measures == "spikes":
        assert measures.spikes.keys() == sites and not measures.harm and not measures.similarity
        assert min(measures.spikes.values()) >= 1 and len(set(measures.spikes.values())) > 2, "one for each site"
    else:
        assert measures.harm.keys() == sites and not measures.similarity
        for curve in curves:
            assert curve.tokens == 4 * 16
            assert list(measures.harm[curve.site]) == [option.nbytes for option in entry.probes(curve)]


@pytest.mark.parametrize("allocate", MEASURING)
def test_stopped_while_measuring_it_goes_on_with_the_next_site(allocate, recipe, tmp_path, monkeypatch):
    """Ends with the same plan and weights, and measures no site twice."""
    asked, (whole, out) = recipe(allocate), (tmp_path / "whole", tmp_path / "out")
    usual, measured = journal.commit, []
    run(prepare(asked, whole))
    units = ("harm", *OF_BLOCKS)

    def dying(path: Path, write: Any) -> None:
        usual(path, write)
        if path.parent.name in units or path.stem in units:
            measured.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "commit", dying)
    stops = 0
    while not (out / "plan.json").exists() and stops < 40:
        try:
            run(prepare(asked, out))
        except KeyboardInterrupt:
            stops += 1
    assert stops == len(measured) == len(set(measured)) >= (1 if ALLOCATORS[allocate].measures in OF_BLOCKS else 14)
    for name in ("plan.json", "model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("allocate", MEASURING)
def test_another_size_measures_nothing_where_statistics_are_shared(allocate, recipe, tmp_path, monkeypatch):
    shared = tmp_path / "statistics"
    run(prepare(recipe(allocate), tmp_path / "first"), statistics=shared)
    alone = tmp_path / "alone"
    run(prepare(recipe(allocate, keep=0.4), alone))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Laboratory, "_lost", refuse)
    monkeypatch.setattr(Laboratory, "_similarities", refuse)
    monkeypatch.setattr(Laboratory, "_spikes", refuse)
    second = tmp_path / "second"
    run(prepare(recipe(allocate, keep=0.4), second), statistics=shared)
    assert (second / "plan.json").read_bytes() == (alone / "plan.json").read_bytes()
    if ALLOCATORS[allocate].measures not in OF_BLOCKS:  # another method is another measurement
        with pytest.raises(AssertionError, match="measured again"):
            run(prepare(recipe(allocate, options={"damping": 0.5}), tmp_path / "third"), statistics=shared)


@pytest.mark.parametrize("on_failure", ["raise", "dense"])
def test_a_site_that_breaks_the_model_is_left_dense_if_the_recipe_says_so(on_failure, recipe, tmp_path, monkeypatch):
    usual = Laboratory._lost

    def lost(self: Laboratory, target: Any, stats: Any, amount: Any) -> float:
        if target.role == "attention.v" and target.block == 1:
            raise NumericalError("the model is not finite")
        return usual(self, target, stats, amount)

    monkeypatch.setattr(Laboratory, "_lost", lost)
    asked = recipe("lems", on_failure=on_failure)
    if on_failure == "raise":
        with pytest.raises(NumericalError, match=r"1\.self_attn\.v_proj: the model is not finite"):
            run(prepare(asked, tmp_path / "out"))
    else:
        degraded = run(prepare(asked, tmp_path / "out")).report.degraded
        assert list(degraded.values()) == ["the model is not finite"]


@pytest.mark.parametrize("allocate", ["importance", "lems", "sensitivity"])
def test_caches_are_divided_by_measurements_too(allocate, model_folder, text_file, tmp_path):
    step = CacheStep("latent", keep=0.6, allocate=allocate)
    result = run(prepare(Recipe(str(model_folder()), [step], Calibration([str(text_file)], 4, 16)), tmp_path / "out"))
    (row,) = [row for row in result.report.rows if row.name == "cache per token"]
    assert row.value <= 0.6 * row.before


def test_targets_are_told_apart_by_what_they_are(laboratory):
    first, second = (target_in(laboratory("kl"), number) for number in (0, 1))
    assert sensitivity.identity(first) == sensitivity.identity(target_in(laboratory("kl"), 0))
    assert sensitivity.identity(first) != sensitivity.identity(second)
    bases = torch.zeros(3, 3), torch.zeros(3, 3)
    bases[1][2, 2] = 1e-30
    assert len({sensitivity.identity(SiteTarget(first.site, PlainSVD(), base)) for base in (None, *bases)}) == 3


def test_no_role_is_lost_on_the_way_to_a_curve():
    assert curve_of("site", [], 10, role="mlp.up", tokens=7).role == "mlp.up"


# --- a perplexity for a budget ----------------------------------------------------------------------------------------


def seeking(recipe: Callable[..., Recipe], ceiling: float, **settings: Any) -> Recipe:
    return recipe("uniform", keep=None, perplexity=ceiling, **settings)


def bytes_of(folder: Path) -> int:
    (plan,) = json.loads((folder / "plan.json").read_text())["steps"]
    return int(plan["nbytes"])


@pytest.mark.parametrize("ceiling", [1, 0.5, -3, math.nan, math.inf])
def test_a_perplexity_that_nothing_falls_below_is_refused_at_once(ceiling):
    with pytest.raises(RecipeError, match=r"perplexity = .* wanted above 1"):
        MethodStep("svd", perplexity=ceiling)


def test_a_perplexity_is_a_budget_of_its_own():
    with pytest.raises(
        RecipeError, match=r"only one of keep, bits, size, perplexity \(came: keep = 0.5 and perplexity"
    ):
        MethodStep("svd", keep=0.5, perplexity=20)
    assert MethodStep("svd", perplexity=20).has_budget


LEARNING = sorted(name for name, entry in ALLOCATORS.items() if entry.learns)


@pytest.mark.parametrize("allocate", LEARNING)
def test_what_is_learned_for_one_size_looks_for_no_perplexity(allocate, recipe, tmp_path):
    with pytest.raises(RecipeError, match="learns a division of one size"):
        prepare(recipe(allocate, keep=None, perplexity=80.0), tmp_path / "out")


def test_one_below_that_of_the_dense_model_is_refused_with_both(recipe, tmp_path):
    with pytest.raises(
        RecipeError, match=r"perplexity 2: the dense model itself has \d+\.\d+ on 4 calibration windows"
    ):
        prepare(seeking(recipe, 2.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_figure_in_the_report_is_that_of_what_was_written(recipe, model_folder, tmp_path):
    """Everything is cut on the inputs of the dense model, so with propagate = none the folder is what was measured."""
    result = run(prepare(seeking(recipe, 1e9), tmp_path / "out"))
    (row,) = [row for row in result.report.rows if row.name == "calibration perplexity"]
    windows = prepare(recipe("uniform"), tmp_path / "other").windows.tokens
    for folder, said in ((tmp_path / "out", row.value), (model_folder(), row.before)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = model(windows).logits.double()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        assert said == pytest.approx(loss.exp().item(), rel=1e-5)
    assert "4 calibration windows" in row.how


def test_another_perplexity_costs_nothing_but_plans_that_are_new(recipe, tmp_path, monkeypatch):
    usual, asked = Laboratory._loss, []
    monkeypatch.setattr(Laboratory, "_loss", lambda self: asked.append(1) or usual(self))

    def sought(ceiling: float, name: str) -> Any:
        ready = prepare(seeking(recipe, ceiling), tmp_path / name)
        del asked[:]  # by which is known that the dense model stays below
        return run(ready, statistics=tmp_path / "statistics")

    first = sought(1e9, "first")
    (row,) = [row for row in first.report.rows if row.name == "calibration perplexity"]
    assert 1 < len(asked) <= 1 + math.log2(planning.GRID)
    sought(1e8, "second")
    assert asked == [], "every plan on the way is known"
    assert (tmp_path / "second" / "plan.json").read_bytes() == (tmp_path / "first" / "plan.json").read_bytes()
    sought(row.before * 1.000001, "third")
    assert len(asked) < math.log2(planning.GRID), "the first plan is that of half the bytes, whatever was asked for"


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Plans measure 100 - 50 · share of the dense bytes; the bytes of those that were measured."""
    tried: list[int] = []

    def perplexity(job: Any, blocks: Any, laboratory: Any, plan: Plan) -> float:
        tried.append(plan.nbytes)
        return 100 - 50 * (plan.nbytes / plan.dense_bytes if plan.choices else 1.0)

    monkeypatch.setattr(planning, "_perplexity", perplexity)
    monkeypatch.setattr(Laboratory, "dense_perplexity", 50.0)
    return tried


def test_the_smallest_budget_of_the_grid_is_found(recipe, tmp_path, falling):
    """And a higher ceiling never takes more bytes."""
    found = []
    for number, ceiling in enumerate((50.01, 61.0, 75.0, 99.9)):
        out = tmp_path / str(number)
        del falling[:]
        result = run(prepare(seeking(recipe, ceiling), out))
        (row,) = [row for row in result.report.rows if row.name == "calibration perplexity"]
        assert row.value < ceiling and row.before == 50
        assert row.value == pytest.approx(100 - 50 * bytes_of(out) / dense_bytes(out))
        # the plan next to it was tried too, unless the allocator had none
        assert all(nbytes >= bytes_of(out) or 100 - 50 * nbytes / dense_bytes(out) >= ceiling for nbytes in falling[1:])
        found.append(bytes_of(out))
    assert found == sorted(found, reverse=True) and len(set(found)) == 4
    with pytest.raises(RecipeError, match="the dense model itself has 50"):
        prepare(seeking(recipe, 50.0), tmp_path / "too low")


def dense_bytes(folder: Path) -> int:
    (plan,) = json.loads((folder / "plan.json").read_text())["steps"]
    return int(plan["dense_bytes"])


@pytest.mark.parametrize("allocate", ["sensitivity", "lems", "block_influence"])
def test_allocators_that_measure_divide_for_a_perplexity_too(allocate, recipe, tmp_path, falling):
    run(prepare(recipe(allocate, keep=None, perplexity=80.0), tmp_path / "out"))
    assert bytes_of(tmp_path / "out") / dense_bytes(tmp_path / "out") == pytest.approx(0.4, abs=0.05)


def test_a_search_that_was_stopped_measures_no_plan_twice(recipe, tmp_path, monkeypatch):
    usual, measured, asked = journal.commit, [], seeking(recipe, 1e9)
    run(prepare(asked, tmp_path / "whole"))

    def dying(path: Path, write: Any) -> None:
        usual(path, write)
        if path.parent.name == "plans":
            measured.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "commit", dying)
    out, stops = tmp_path / "out", 0
    while not (out / "plan.json").exists() and stops < 40:
        try:
            run(prepare(asked, out))
        except KeyboardInterrupt:
            stops += 1
    assert stops == len(measured) == len(set(measured)) > 1
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
