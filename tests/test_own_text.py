"""Windows that the model writes: drawn from what it predicts, and from nothing else."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tersely import own_text, pipeline, temper
from tersely.checkpoint import open_source, read_tokenizer
from tersely.errors import AnatomyError, NumericalError, RecipeError
from tersely.estimate.memory import held
from tersely.journal import Journal
from tersely.pipeline import run
from tersely.prepare import examine, prepare
from tersely.recipe import Calibration, MethodStep, Recipe, read_recipe
from tersely.settings import Calibration as Settings

Folder = Callable[..., Path]


def written(folder: Path, windows: int = 40, length: int = 16, seed: int = 0, first: int | None = None) -> torch.Tensor:
    return own_text.write(open_source(folder), read_tokenizer(folder), (windows, length), seed, first, "cpu")


@pytest.fixture
def recipe(model_folder: Folder, text_file: Path) -> Callable[..., Recipe]:
    def make(family: str = "llama", own: float = 0.25, **settings: Any) -> Recipe:
        step = MethodStep("svd_llm", keep=0.6, **settings)
        return Recipe(str(model_folder(family)), [step], Calibration([str(text_file)], 16, 16, own_text=own))

    return make


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_tokens_are_drawn_from_what_is_predicted(family, model_folder):
    """Whatever came before, -log p(x_t) is H(p_t) in the mean: their differences add up like a walk without drift, and
    its variance is the sum of those of -log p_t under p_t."""
    folder = model_folder(family)
    windows = written(folder, windows=64, length=24)
    tokenizer = read_tokenizer(folder)
    prompt = torch.full((64, 1), own_text.start_token(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    never = [*tokenizer.all_special_ids, *range(len(tokenizer), model.config.vocab_size)]
    with torch.no_grad():
        logits = 1.0 * model(torch.cat([prompt, windows], dim=1)).logits[:, :-1]
    logits[..., never] = -math.inf
    log_p = logits.log_softmax(-1)
    p, surprise = log_p.exp(), (-log_p).masked_fill(log_p.isinf(), 0.0)
    entropy = (p * surprise).sum(-1)
    variance = (p * surprise.square()).sum(-1) - entropy.square()
    came = surprise.gather(-1, windows[..., None])[..., 0]
    assert variance.sum() > 0.1
    assert abs((came - entropy).sum()) < 4 * variance.sum().sqrt()


def test_no_special_token_is_drawn_and_none_that_the_tokenizer_lacks(model_folder):
    folder = model_folder(vocab_size=80)  # as padded for the hardware: the tokenizer has 60
    windows = written(folder, windows=200)
    assert windows.min() >= 3
    assert windows.max() < 60


def test_a_window_begins_with_the_token_that_the_model_needs(model_folder):
    windows = written(model_folder("gemma3_text"), first=2)
    assert (windows[:, 0] == 2).all()
    assert (windows[:, 1:] >= 3).all()


def test_the_first_windows_of_more_are_the_same_and_the_seed_decides(model_folder):
    folder = model_folder()
    state = torch.random.get_rng_state()
    few, many, others = written(folder, 5), written(folder, 40), written(folder, 5, seed=1)
    assert torch.equal(few, many[:5])
    assert not torch.equal(few, others)
    assert len({tuple(row) for row in many.tolist()}) == 40
    assert torch.equal(state, torch.random.get_rng_state()), "what others draw is not touched"


def test_settings_of_the_checkpoint_do_not_bend_what_is_drawn(model_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    greedy = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 3.0, "eos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(greedy))
    assert torch.equal(written(folder, 5), written(model_folder(), 5))


def test_predictions_that_are_not_finite_are_refused(model_folder, monkeypatch):
    usual = own_text.whole_model

    def broken(*arguments: Any) -> Any:
        model = usual(*arguments)
        model.lm_head.weight = torch.nn.Parameter(torch.full_like(model.lm_head.weight, math.nan), requires_grad=False)
        return model

    monkeypatch.setattr(own_text, "whole_model", broken)
    with pytest.raises(NumericalError, match="cannot write"):
        written(model_folder(), 1)


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("samples", [1, 2, 7, 32, 128])
def test_there_is_always_a_window_of_text_and_what_is_resolved_says_the_same(share, samples):
    asked = Settings(samples=samples, own_text=share)
    own = asked.written()
    assert 0 <= own < samples
    assert abs(own - share * samples) <= max(0.5, 1 - (1 - share) * samples)
    for read in range(1, samples - own + 1):  # the text may hold fewer
        beside = asked.written(read)
        assert Settings(samples=read + beside, own_text=share).written() == pytest.approx(beside, abs=0), (read, beside)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, math.nan])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(RecipeError, match=r"own_text = .*wanted 0 or more, below 1"):
        Settings(own_text=share)


# --- in a run ---------------------------------------------------------------------------------------------------------


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_statistics_see_the_text_and_what_the_model_wrote(family, recipe, tmp_path, monkeypatch):
    seen: list[torch.Tensor] = []
    usual = pipeline.run_step
    monkeypatch.setattr(pipeline, "run_step", lambda step, scene: (seen.append(scene.windows), usual(step, scene))[1])
    prepared = prepare(recipe(family), tmp_path / "out")
    run(prepared)
    text = prepared.windows
    first = 2 if family == "gemma3_text" else None
    assert text is not None and text.tokens.shape == (12, 16) and text.own == 4
    assert torch.equal(seen[0][:12], text.tokens)
    assert torch.equal(seen[0][12:], written(Path(prepared.recipe.model), 4, first=first))
    said = report_of(tmp_path / "out")["calibration"]
    assert (said["samples"], said["own"], said["tokens"]) == (16, 4, 256)
    assert len(said["own_sha256"]) == 64
    again = read_recipe(tmp_path / "out" / "recipe.toml")
    assert (again.calibration.samples, again.calibration.own_text) == (16, 0.25)
    assert "4 of them written by the dense model itself" in (tmp_path / "out" / "README.md").read_text()


def test_without_a_share_nothing_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "write", lambda *_: pytest.fail("nobody asked for it"))
    run(prepare(recipe(own=0.0), tmp_path / "out"))
    assert "own_sha256" not in report_of(tmp_path / "out")["calibration"]


def test_the_factor_of_the_logits_is_found_on_as_large_a_share(recipe, tmp_path, monkeypatch):
    seen: list[torch.Tensor] = []
    usual = pipeline.run_step
    monkeypatch.setattr(pipeline, "run_step", lambda step, scene: (seen.append(scene.unseen), usual(step, scene))[1])
    prepared = prepare(recipe(temper=True), tmp_path / "out")
    run(prepared)
    both = written(Path(prepared.recipe.model), 4 + temper.WINDOWS // 4)
    assert prepared.unseen is not None and len(prepared.unseen) == len(seen[0]) == temper.WINDOWS
    assert torch.equal(seen[0][-8:], both[4:]), "and not on those that the weights are fitted to"
    read = {tuple(row) for row in prepared.unseen.tolist()}
    assert all(tuple(row) in read for row in seen[0][:-8].tolist())


def test_a_run_that_is_taken_up_reads_what_was_written(recipe, tmp_path, monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    asked = recipe()
    run(prepare(asked, tmp_path / "unbroken"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "run_step", stop)
        run(prepare(asked, tmp_path / "out"))
    monkeypatch.setattr(own_text, "write", lambda *_: pytest.fail("it had been written"))
    run(prepare(asked, tmp_path / "out"))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "unbroken")]
    assert weights[0] == weights[1]


def test_beside_shared_statistics_it_is_written_once(recipe, tmp_path, monkeypatch):
    asked = recipe()
    run(prepare(asked, tmp_path / "one"), statistics=tmp_path / "kept")
    (file,) = (tmp_path / "kept").glob("own_text-*")
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "write", lambda *_: pytest.fail("it had been written"))
        run(prepare(asked, tmp_path / "two"), statistics=tmp_path / "kept")
    run(prepare(replace(asked, seed=1), tmp_path / "three"), statistics=tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("own_text-*"))) == 2
    assert file.exists()


def test_torn_windows_are_named(tmp_path):
    place = tmp_path / own_text.file_name("model", 3)
    place.write_bytes(b"torn")
    journal = Journal(tmp_path / "out", "this")
    journal.begin()
    with pytest.raises(Exception, match=place.name):
        own_text.kept(place, journal, lambda: torch.zeros(1, 2, dtype=torch.long))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_ends_is_refused_before_work(recipe, tmp_path, model_folder):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    said = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        said.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(RecipeError, match="neither bos_token nor eos_token; set own_text = 0"):
        prepare(replace(recipe(), model=str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_perplexity_of_own_text_is_refused(recipe, tmp_path):
    asked = recipe()
    step = MethodStep("svd_llm", perplexity=100.0)
    with pytest.raises(RecipeError, match="what a model writes itself it predicts too well"):
        prepare(replace(asked, step=[step]), tmp_path / "out")


def test_a_model_that_writes_nothing_is_refused(recipe, tmp_path, model_folder):
    asked = replace(recipe(), model=str(model_folder("bert")))
    with pytest.raises((AnatomyError, RecipeError)):
        prepare(asked, tmp_path / "out")


def test_the_estimate_counts_the_model_that_writes(recipe):
    plain, writing = (examine(recipe(own=share), None) for share in (0.0, 0.25))
    assert held(writing.recipe, writing) >= held(plain.recipe, plain)
