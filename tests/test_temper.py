"""One factor for all logits: the least loss that a factor can give, and nothing else is changed by it."""

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

import tersely
from tersely import journal, temper
from tersely.anatomy import anatomy_of
from tersely.checkpoint import open_source
from tersely.errors import AnatomyError, RecipeError
from tersely.pipeline import run
from tersely.predictions import Predictions
from tersely.prepare import prepare
from tersely.recipe import Calibration, MethodStep, Recipe

DEMO = Path(tersely.__file__).parent / "assets" / "demo"


@pytest.fixture
def recipe(model_folder: Callable[..., Path], text_file: Path) -> Callable[..., Recipe]:
    def make(family: str = "llama", architecture: str | None = None, **settings: Any) -> Recipe:
        step = MethodStep("svd_llm", keep=0.4, temper=True)
        model = model_folder(family, architecture) if architecture else model_folder(family)
        return Recipe(str(model), [replace(step, **settings)], Calibration([str(text_file)], 4, 16))

    return make


def tokens(vocabulary: int = 60) -> Tensor:
    return torch.randint(3, vocabulary, (3, 12), generator=torch.Generator().manual_seed(1))


def factor_of(folder: Path) -> float:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (found,) = (row["value"] for row in report["rows"] if row["name"] == "factor of logits")
    return found


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits.double()


# gpt2's norm has a bias, gemma3 stores gains less one and goes without bounds on its logits, opt has neither
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "gpt_neox"])
def test_it_scales_all_logits_and_does_nothing_else(family, recipe, tmp_path):
    asked = recipe(family)
    run(prepare(asked, tmp_path / "tempered"))
    run(prepare(replace(asked, step=[replace(asked.step[0], temper=False)]), tmp_path / "plain"))
    factor, plain, tempered = factor_of(tmp_path / "tempered"), *(logits(tmp_path / n) for n in ("plain", "tempered"))
    assert abs(factor - 1) > 1e-3
    torch.testing.assert_close(tempered, factor * plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(tempered.argmax(-1), plain.argmax(-1))
    other = [open_source(tmp_path / name) for name in ("plain", "tempered")]
    changed = {name for name in other[0].stored if not torch.equal(*(source.tensor(name) for source in other))}
    norm = temper.check(anatomy_of(other[0].skeleton()))
    assert changed == {f"{norm.name}.weight", *([f"{norm.name}.bias"] if norm.bias else [])}


def test_the_divergence_is_least_at_the_factor(recipe, tmp_path, monkeypatch):
    """dD/dt = E[Σ (q - p) z] is zero there, and D above it on either side."""
    seen: list[Tensor] = []
    usual = temper.unseen
    monkeypatch.setattr(temper, "unseen", lambda *windows: (seen.append(usual(*windows)[0]) or seen[0], None))
    # one that was trained: of what a random model says, the less the better
    asked = Recipe(str(DEMO), recipe(keep=0.5).step, Calibration(["stdlib"], 8, 32))
    run(prepare(asked, tmp_path / "out"))
    (rows,) = seen
    with torch.no_grad():
        dense, z = (
            AutoModelForCausalLM.from_pretrained(folder).double()(rows).logits[:, :-1]
            for folder in (DEMO, tmp_path / "out")
        )
    p = dense.softmax(-1)

    def divergence(factor: float) -> float:
        return torch.linalg.vecdot(p, p.log() - (factor * z).log_softmax(-1)).mean().item()

    assert divergence(1.0) < min(divergence(0.99), divergence(1.01))
    assert abs(torch.linalg.vecdot(z.softmax(-1) - p, z).mean().item()) < 1e-3 * z.std().item()
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    (row,) = (row for row in report["rows"] if row["name"] == "factor of logits")
    assert f"{divergence(1 / row['value']):.4f} to {divergence(1.0):.4f} nats" in row["how"]


def test_a_model_that_has_lost_nothing_keeps_its_temperature(recipe, tmp_path):
    asked = recipe(keep=None, method="gptq", options={"width": 8, "group": 4})
    run(prepare(replace(asked, model=str(DEMO)), tmp_path / "out"))
    assert factor_of(tmp_path / "out") == pytest.approx(1.0, abs=1e-3)


def test_the_head_asked_apart_says_what_the_model_says(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder()).double()
    predictions, rows = Predictions(model), tokens()
    (batch,) = predictions.batches(rows)
    with torch.no_grad():
        logits = model(rows).logits
    (asked,) = (logits for _, logits in predictions.heads(batch, predictions.body(batch)))
    torch.testing.assert_close(asked, logits[:, :-1], rtol=1e-12, atol=1e-12)
    whole = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert predictions.loss([batch]) == pytest.approx(whole.item(), rel=1e-12)


def test_windows_are_those_that_nothing_else_has_seen():
    text = torch.arange(200).view(50, 4)
    fresh, warning = temper.unseen(text, text[::2], text[1:3])
    assert fresh.tolist() == text[3::2].tolist()
    assert warning is None
    assert len(temper.unseen(text, text[:2])[0]) == temper.WINDOWS


def test_few_windows_or_none_that_are_unseen_are_warned_of():
    text = torch.arange(200).view(50, 4)
    fresh, warning = temper.unseen(text, text[3:])
    assert fresh.tolist() == text[:3].tolist() and "3 windows" in warning and "these 3" in warning
    seen, warning = temper.unseen(text, text)
    assert seen.tolist() == temper.unseen(text)[0].tolist() and "0 windows" in warning and "fitted to" in warning


def test_a_text_that_is_drawn_whole_is_warned_of(recipe, tmp_path):
    asked = recipe()
    drawn = replace(asked, calibration=replace(asked.calibration, samples=10_000))
    assert any("give more text, or fewer samples" in warning for warning in prepare(drawn, tmp_path / "out").warnings)


def test_where_no_factor_is_better_nothing_is_changed(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(temper, "divergence", lambda *arguments: 1.0)
    asked = recipe()
    run(prepare(asked, tmp_path / "tempered"))
    run(prepare(replace(asked, step=[replace(asked.step[0], temper=False)]), tmp_path / "plain"))
    assert factor_of(tmp_path / "tempered") == 1.0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "tempered"))
    assert first == second


def test_stopped_when_it_is_found_it_ends_with_the_same_bytes(recipe, tmp_path, monkeypatch):
    asked, usual = recipe(), journal.commit
    run(prepare(asked, tmp_path / "whole"))

    def dying(path: Path, write: Any) -> None:
        usual(path, write)
        if path.name == temper.UNIT:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "commit", dying)
    with pytest.raises(KeyboardInterrupt):
        run(prepare(asked, tmp_path / "out"))
    monkeypatch.setattr(journal, "commit", usual)
    monkeypatch.setattr(temper, "_found", lambda *arguments: pytest.fail("looked for again"))
    run(prepare(asked, tmp_path / "out"))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert first == second


def test_later_steps_and_other_methods_go_on_from_it(recipe, tmp_path):
    asked = recipe(propagate="input")
    steps = [*asked.step, MethodStep("gptq", temper=True, options={"width": 4})]
    run(prepare(replace(asked, step=steps), tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert sum(row["name"] == "factor of logits" for row in report["rows"]) == 2
    assert math.isfinite(logits(tmp_path / "out").sum().item())


def test_a_table_that_is_rounded_too_is_read_as_it_then_is(recipe, tmp_path):
    step = MethodStep("rtn", target=["all", "embeddings", "head"], temper=True, options={"width": 3})
    asked = replace(recipe(), model=str(DEMO), step=[step])
    run(prepare(asked, tmp_path / "tempered"))
    run(prepare(replace(asked, step=[replace(step, temper=False)]), tmp_path / "plain"))
    factor, plain, tempered = factor_of(tmp_path / "tempered"), *(logits(tmp_path / n) for n in ("plain", "tempered"))
    assert factor != 1.0
    torch.testing.assert_close(tempered, factor * plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "architecture", "error"),
    [("llama", "LlamaModel", AnatomyError), ("bert", None, (AnatomyError, RecipeError))],
)
def test_without_predictions_it_is_refused_before_any_work(family, architecture, error, recipe, tmp_path):
    with pytest.raises(error):
        prepare(recipe(family, architecture), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_with_a_base_it_is_refused():
    with pytest.raises(RecipeError, match="without the norm that temper would scale"):
        MethodStep("delta_come", base="somewhere", temper=True)
