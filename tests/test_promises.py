"""Promises that were once broken without a word, each as a user would notice."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tersely import demo, pipeline, sweeps
from tersely.cli import main
from tersely.errors import CheckpointError, NumericalError, RecipeError
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.pipeline import compress, run
from tersely.prepare import prepare
from tersely.recipe import recipe_from
from tersely.verify import verify

DEMO = Path(demo.__file__).parent / "assets" / "demo"
TEXT = "def answer(question):\n    return 42\n\nclass Number:\n    pass\n" * 400


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def asked(model, text, **more):
    step = {"method": "svd_llm", "keep": 0.6} | more.pop("step", {})
    return recipe_from(
        {"model": str(model), "step": [step], "calibration": {"source": [str(text)], "samples": 4}} | more
    )


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def edit(model, change):
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def test_a_run_does_not_go_on_with_another_text(model, text, tmp_path, monkeypatch):
    cut = sweeps._cut_in_stream

    def stop_at_two(job, block, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        return cut(job, block, index, *rest)

    monkeypatch.setattr(sweeps, "_cut_in_stream", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        run(prepare(asked(model, text), tmp_path / "out"))
    monkeypatch.undo()
    text.write_text(TEXT.replace("42", "43"))
    with pytest.raises(CheckpointError, match="unfinished run of another recipe"):
        prepare(asked(model, text), tmp_path / "out")
    text.write_text(TEXT)
    assert run(prepare(asked(model, text), tmp_path / "out")).out.is_dir()


def test_statistics_are_not_shared_by_models_that_differ_in_configuration_alone(model, text, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    store = tmp_path / "statistics"
    none = {"propagate": "none", "allocate": "uniform"}
    run(prepare(asked(model, text, step=none), tmp_path / "a"), statistics=store)
    alone = run(prepare(asked(other, text, step=none), tmp_path / "b")).out / "model.safetensors"
    shared = run(prepare(asked(other, text, step=none), tmp_path / "c"), statistics=store).out / "model.safetensors"
    assert shared.read_bytes() == alone.read_bytes()
    assert len(list(store.iterdir())) == 2


def test_verify_notices_weights_that_were_added(model, text, tmp_path):
    out = run(prepare(asked(model, text, shard_size=400_000), tmp_path / "out")).out
    assert all(check.passed for check in verify(out))
    save_file({"a": torch.zeros(1)}, out / "model.safetensors", metadata={"format": "pt"})
    failed = {check.name: check.detail for check in verify(out) if not check.passed}
    assert "not written by the run" in failed["checksums"] and "model.safetensors" in failed["checksums"]


def test_verify_says_which_file_is_cut_short(model, text, tmp_path):
    out = run(prepare(asked(model, text), tmp_path / "out")).out
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-100])
    checks = {check.name: check for check in verify(out)}
    assert not checks["checksums"].passed and not checks["weights"].passed
    assert "truncated or damaged" in checks["weights"].detail
    assert command("verify", out) == 1


def test_tensors_without_a_place_are_named(model, text, tmp_path):
    edit(model, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}))
    (warning, *_) = prepare(asked(model, text), tmp_path / "out").warnings
    assert warning.startswith("1 tensors of the checkpoint have no place in the model")
    assert "model.layers.0.self_attn.q_proj.bias" in warning


def test_a_site_that_fails_in_the_first_sweep_is_left_dense_and_reported(model, text, tmp_path, monkeypatch):
    usual = WhitenedSVD.options

    def options(self, weight, stats):
        if weight.shape[0] == 48:
            raise NumericalError("no luck")
        return usual(self, weight, stats)

    monkeypatch.setattr(WhitenedSVD, "options", options)
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.self_attn\.k_proj: no luck"):
        run(prepare(asked(model, text), tmp_path / "a"))
    report = run(prepare(asked(model, text, step={"on_failure": "dense"}), tmp_path / "b")).report
    assert len(report.degraded) == 8 and set(report.degraded.values()) == {"no luck"}
    assert "8 degraded, left dense" in report.coverage
    assert "no luck" in (tmp_path / "b" / "report.html").read_text()


@pytest.mark.parametrize("wrong", ["short", "absent"])
def test_an_evaluation_that_cannot_be_made_is_refused_before_work(wrong, model, text, tmp_path, capsys):
    short = tmp_path / "short.txt"
    if wrong == "short":
        short.write_text("too short")
    out = tmp_path / "out"
    arguments = ("--method", "svd_llm", "--keep", 0.6, "--calibrate", text, "--evaluate", short)
    assert command("compress", model, out, *arguments) == 2
    assert not out.exists()
    assert str(short) in capsys.readouterr().err


def test_another_evaluation_is_no_other_run(model, text, tmp_path):
    recipes = [asked(model, text), asked(model, text, evaluation={"text": [str(text)], "windows": 1})]
    assert len({recipe.fingerprint() for recipe in recipes}) == 1


def test_a_run_that_is_taken_up_measures_a_text_that_has_changed(model, text, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    read, out = tmp_path / "read.txt", tmp_path / "out"
    whole = text.read_text(encoding="utf-8")
    read.write_text(whole[: len(whole) // 2], encoding="utf-8")
    recipe = asked(model, text, evaluation={"text": [str(read)], "windows": 2})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_report", stop)
        run(prepare(recipe, out))
    read.write_text(whole, encoding="utf-8")
    (said,) = run(prepare(recipe, out)).report.evaluation["texts"]
    assert said["sha256"] == hashlib.sha256(read.read_bytes()).hexdigest()


def test_a_figure_has_a_place_before_it_is_measured(model, text, tmp_path, capsys):
    assert command("eval", model, "--text", text, "--json", tmp_path / "nowhere" / "figures.json") == 2
    assert "no such folder" in capsys.readouterr().err


def test_tokens_that_the_model_does_not_have_are_refused(model, text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["answer"])
    tokenizer.save_pretrained(model)
    with pytest.raises(RecipeError, match="the tokenizer made token 1024, the model knows 1024"):
        prepare(asked(model, text), tmp_path / "out")


def test_a_budget_above_what_there_is_is_no_budget(model, text, tmp_path):
    with pytest.raises(RecipeError, match="the targets take 32 bits per weight now"):
        compress(model, tmp_path / "out", method="svd", bits=64)


def test_a_call_says_what_a_recipe_says(model, text, tmp_path):
    compress(
        model, tmp_path / "called", method="svd", keep=0.5, calibrate=[str(text)], samples=4, length=16, order="first"
    )
    plain = {"model": str(model), "step": [{"method": "svd", "keep": 0.5}]}
    calibration = {"source": [str(text)], "samples": 4, "length": 16, "order": "first"}
    run(prepare(recipe_from(plain | {"calibration": calibration}), tmp_path / "read"))
    assert (tmp_path / "called" / "recipe.toml").read_text() == (tmp_path / "read" / "recipe.toml").read_text()


def test_a_demo_that_was_stopped_goes_on_and_removes_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "KEEPS", (0.8,))
    monkeypatch.setattr(demo, "ENTRIES", demo.ENTRIES[:2])
    out = tmp_path / "demo"
    monkeypatch.setattr(demo, "run_bench", lambda *given, **named: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(out, lambda *said: None)
    monkeypatch.undo()
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "KEEPS", (0.8,))
    monkeypatch.setattr(demo, "ENTRIES", demo.ENTRIES[:2])
    (out / "notes.txt").write_text("precious")
    for _ in range(2):  # goes on; then makes it anew
        demo.check_place(out)
        demo.run_demo(out, lambda *said: None)
        assert (out / "report.html").is_file()
        assert (out / "notes.txt").read_text() == "precious"
    shutil.rmtree(out)
    out.mkdir()
    (out / "demo.json").write_text(json.dumps({"command": "tersely bench low-rank …", "rows": []}))
    with pytest.raises(RecipeError, match="another bench"):
        demo.check_place(out)


def test_a_run_leaves_the_precision_of_the_process_alone(model, text, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        run(prepare(asked(model, text), tmp_path / "out"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
