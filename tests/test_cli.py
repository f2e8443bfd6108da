"""The command line: what is refused, with which words and status; what the commands promise when all goes well."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tersely
from conftest import WORDS
from tersely import cli, job, prepare, sweeps
from tersely.checkpoint import read_tokenizer
from tersely.cli import application
from tersely.errors import NumericalError
from tersely.generate import stream
from tersely.journal import Journal
from tersely.train import loop

WEIGHTS = "model.safetensors"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tersely_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function: arguments of the command → exit status, standard output, standard error."""
    monkeypatch.setattr(application, "debugging", False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def refused(tersely_: Run, tmp_path: Path) -> Callable[..., None]:
    """A function: the command ends with status 2, says why in one line, and writes nothing."""

    def refused(message: str, *arguments: object) -> None:
        before = tree(tmp_path)
        status, out, err = tersely_(*arguments)
        assert (status, out) == (2, ""), err
        assert len(err.splitlines()) == 1, err
        assert re.search(rf"^error: .*{message}", err), err
        assert tree(tmp_path) == before

    return refused


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def usual(text_file: Path) -> list[str]:
    """A small calibration."""
    return ["--calibrate", str(text_file), "--length", "16", "--samples", "4"]


def reading(out: Path, name: str) -> dict[str, Any]:
    """One number of a report."""
    (row,) = [row for row in json.loads((out / "report.json").read_text())["rows"] if row["name"] == name]
    return row


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method svd_lm --keep 0.6", r"unknown method 'svd_lm'; did you mean 'svd_llm'\? known: .*svd, svd_llm"),
        ("--keep 0.6", "give --method NAME, or --recipe FILE"),
        ("--method svd", r"could become one of .* sizes; give one of keep, bits, size and perplexity"),
        ("--method svd --keep 0.6 --size 1MB", r"only one of .* \(came: keep = 0\.6 and size = 1MB\)"),
        ("--method svd --keep 0.6 --bits 8", r"only one of .* \(came: keep = 0\.6 and bits = 8"),
        ("--method svd --keep 0", r"keep = 0\.0; wanted above 0 and at most 1"),
        ("--method svd --keep -0.5", r"keep = -0\.5; wanted above 0 and at most 1"),
        ("--method svd --keep 1.01", r"keep = 1\.01; wanted above 0 and at most 1"),
        ("--method svd --keep nan", "keep = nan; wanted above 0 and at most 1"),
        ("--method svd --bits 0", r"bits = 0\.0; wanted above 0"),
        ("--method svd --bits nan", "bits = nan; wanted above 0"),
        ("--method svd --size much", "size 'much'; wanted bytes such as 300MB"),
        ("--method svd --size nan", "size 'nan'"),
        ("--method svd --size inf", "size 'inf'"),
        ("--method svd --size -1MB", "size = '-1MB'; wanted above 0"),
        ("--method svd --size 1KB", r"size 1KB: everything but the targets takes \d+ bytes already"),
        ("--method svd --keep 1e-4", r"budget of \d+ bytes .* smallest form takes \d+; keep at least 0\.\d+"),
        ("--method svd --keep 1e-4 --set allocate=uniform", r"smallest option takes .* keep at least 0\.\d+"),
        (
            "--method svd_llm --keep 0.6 --set dampin=1",
            r"method svd_llm: unknown option 'dampin'; did you mean 'damping'",
        ),
        ("--method svd_llm --keep 0.6 --set damping", "--set damping: wanted KEY=VALUE"),
        ("--method svd_llm --keep 0.6 --set damping=lots", r"method svd_llm: damping: .*came: 'lots'"),
        ("--method svd_llm --keep 0.6 --set damping=-1", r"damping -1\.0; wanted 0 or more"),
        ("--method asvd --keep 0.6 --set scale=median", r"method asvd: scale: .*came: 'median'"),
        ("--method svd --keep 0.6 --set allocate=gredy", r"unknown allocator 'gredy'; did you mean 'greedy'"),
        ("--method svd --keep 0.6 --set propagate=blok", r"propagate: .*came: 'blok'"),
        ("--method svd --keep 0.6 --set keep=0.5", "--set keep"),
        ("--method svd --keep 0.6 --target mpl", r"unknown target 'mpl'; did you mean 'mlp'"),
        ("--method svd --keep 0.6 --target mlp *.layers.9.*", r"unknown target '\*\.layers\.9\.\*'"),
        ("--method svd --keep 0.6 --device cdua", "device 'cdua' is not available here"),
        ("--method svd --keep 0.6 --dtype float8", r"dtype: .*came: 'float8'"),
        ("--method svd --keep 0.6 --order last", r"order: .*came: 'last'"),
        ("--method svd_llm --keep 0.6 --length 65", r"length 65 is beyond the model's context of 64"),
        ("--method svd_llm --keep 0.6 --length 1", "length = 1; wanted 2 or more"),
        ("--method svd_llm --keep 0.6 --samples 0", "samples = 0; wanted 1 or more"),
        ("--method svd --keep 0.6 --threads 0", r"--threads 0; wanted 1 to \d+, the processors of this machine"),
        ("--method svd --keep 0.6 --threads 100000", r"--threads 100000; wanted 1 to \d+"),
        ("--method svd --keep 0.6 --seed -3", r"--seed -3; wanted 0 or more, below 2\^63"),
        ("--method svd --keep 0.6 --revision main", "--revision main was given with the local folder"),
        ("--method svd --keep 0.6 --evaluate nowhere.txt", r"text 'nowhere\.txt': no such file"),
    ],
)
def test_flags_that_are_wrong_are_refused(flags, message, refused, usual, model_folder, tmp_path):
    given = flags.split()
    calibration = [] if {"--length", "--samples"} & set(given) else usual
    refused(message, "compress", model_folder(), tmp_path / "out", *calibration, *given)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--keep half --method svd", "--keep"),
        ("--keeep 0.5 --method svd", "--keep"),
        ("--keep", "--keep"),
        ("--seed 0.5 --method svd --keep 0.5", "--seed"),
        ("another-argument --method svd --keep 0.5", "another-argument"),
    ],
)
def test_flags_that_do_not_exist_or_parse_are_refused(flags, message, tersely_, model_folder, tmp_path):
    status, out, err = tersely_("compress", model_folder(), tmp_path / "out", *flags.split())
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_command_that_does_not_exist_is_refused(tersely_):
    status, _, err = tersely_("compres")
    assert status == 2
    assert "compress" in err
    status, _, err = tersely_("compress", "--method", "svd", "--keep", "0.5")
    assert status == 2
    assert "give MODEL and OUT" in err


def without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def truncated(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:9000])


def with_a_nan(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def of_another_family(model: Path) -> None:
    """One that transformers knows, and tersely does not."""
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"no such folder; give a folder with config\.json, or a hub name"),
        (without_config, r"no config\.json"),
        (without_tokenizer, r"no tokenizer \(looked for"),
        (truncated, r"model\.safetensors: truncated or damaged"),
        (with_a_nan, r"NaN or infinite weights in model\.norm\.weight"),
        (of_another_family, r"unknown model family 'olmo'; .*known: .*llama"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_are_wrong_are_refused(damage, message, refused, usual, model_folder, copy_of, tmp_path):
    model = copy_of(model_folder())
    damage(model)
    refused(message, "compress", model, tmp_path / "out", "--method", "svd_llm", "--keep", "0.6", *usual)


def garbage(model: Path) -> None:
    (model / WEIGHTS).write_bytes(b"no header" * 1000)


def without_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()


def a_folder_for_weights(model: Path) -> None:
    without_weights(model)
    (model / WEIGHTS).mkdir()


def misshapen(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def of_a_width_in_words(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))


def quantized_by_a_number(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": 3}))


@pytest.mark.parametrize("command", ["eval --text {text}", "generate --prompt w5", "plan", "diagnose --text {text}"])
@pytest.mark.parametrize("ours", [False, True], ids=["a checkpoint", "what tersely wrote"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"model\.safetensors: truncated or damaged"),
        (garbage, r"model\.safetensors: truncated or damaged"),
        (a_folder_for_weights, r"model\.safetensors"),
        (without_weights, r"no weights \(looked for|no file named model\.safetensors"),
        (misshapen, r"model\.safetensors: model\.norm\.weight has shape \(31,\), the configuration wants \(32,\)"),
        (with_a_nan, r"NaN or infinite weights in model\.norm\.weight"),
        (of_a_width_in_words, r"config\.json: .*hidden_size"),
        (quantized_by_a_number, r"config\.json: quantization_config = 3; wanted a table"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_models_are_refused_by_whatever_opens_them(
    damage, message, ours, command, tersely_, compressed, model_folder, copy_of, text_file
):
    model = copy_of(compressed() if ours else model_folder())
    damage(model)
    name, *flags = command.format(text=text_file).split()
    status, out, err = tersely_(name, model, *flags)
    if damage is with_a_nan and name == "plan":
        assert status == 0, err  # which reads headers
        return
    assert (status, out) == (2, ""), err
    assert re.search(rf"^error: .*{message}", err, flags=re.MULTILINE), err
    assert "unexpected" not in err
    if ours:
        assert tersely_("verify", model)[0] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt.* is empty"),
        ("blank.txt", b" \n\t\n", r"blank\.txt.* is empty"),
        ("short.txt", b"w5 w6 w7", r"short\.txt has 3 tokens, a window takes 16"),
        ("latin.txt", b"caf\xe9 w5", r"latin\.txt: not UTF-8 at byte 3"),
        ("no-json.jsonl", b'{"text": "w5"}\n{"text', r"no-json\.jsonl, line 2: not JSON"),
        ("no-text.jsonl", b'{"txt": "w5"}', r"no-text\.jsonl, line 1: no string field 'text'"),
        ("missing.txt", None, r"missing\.txt': no such file"),
    ],
)
def test_texts_that_are_wrong_are_refused(name, content, message, refused, model_folder, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    given = ["--calibrate", tmp_path / name, "--length", "16", "--method", "svd_llm", "--keep", "0.6"]
    refused(message, "compress", model_folder(), tmp_path / "out", *given)


def test_places_that_are_wrong_are_refused(refused, usual, model_folder, compressed, copy_of, tmp_path):
    flags = ["--method", "svd_llm", "--keep", "0.6", *usual]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "diary.txt").write_text("today")
    (tmp_path / "file").write_text("a file")
    model = copy_of(model_folder())
    for out, message in (
        (tmp_path / "foreign", "foreign exists and holds no unfinished run; choose another folder or remove it"),
        (copy_of(compressed()), "out exists and holds no unfinished run"),
        (tmp_path / "file", "file is a file; choose another place"),
        (tmp_path / "file" / "out", "out: .*file is a file; choose another place"),
        (model, "is the model itself"),
    ):
        refused(message, "compress", model, out, *flags)
        refused(message, "compress", model, out, *flags, "--fresh")


@pytest.fixture
def locked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which nothing may be written, whoever runs the tests."""
    folder, usual = tmp_path / "locked", os.access
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and usual(path, mode))
    return folder


NO_FILE = {
    "folder": "{place} is a folder; name a file in it",
    "nowhere/x.json": "{place}: no such folder; make it first",
    "file/x.json": "{place}: .*/file is a file; choose another place",
    "locked/x.json": "{place}: nothing may be written in .*/locked; choose another place",
    f"{'x' * 300}.json": "{place}: File name too long; choose another place",
    f"{'x' * 245}.json": "{place}: File name too long; choose another place",
    "pipe": "{place} is no ordinary file; name another one",
}
NO_FOLDER = {
    "file": "{place} is a file; choose another place",
    "file/x": "{place}: .*/file is a file; choose another place",
    "locked/x/y": "{place}: nothing may be written in .*/locked; choose another place",
    "x" * 300: "{place}: File name too long; choose another place",
    "dangling": "{place} is a link to nothing; choose another place",
}
FILES = {
    "eval": "eval {model} --text {text} --json {place}",
    "diagnose": "diagnose {model} --what outliers --text {text} --json {place}",
    "bench": "bench low-rank {model} --text {text} --calibrate {text} --json {place}",
    "report": "report {small} --out {place}",
}
FOLDERS = {
    "compress": "compress {model} {place} --method svd --keep 0.6",
    "train": "train {model} {place} --method adapter",
    "convert": "convert {model} {place} --method fope",
    "dry run": "compress {model} {place} --method svd --keep 0.6 --dry-run",
    "statistics": "compress {model} {free} --method svd --keep 0.6 --statistics {place}",
    "export": "export {small} {place} --to dense",
    "demo": "demo {place}",
}


@pytest.mark.usefixtures("locked_up")
@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
def test_places_that_cannot_be_written_are_refused_before_any_work(
    command, refused, model_folder, compressed, text_file, tmp_path, monkeypatch
):
    for module in ("tersely.pipeline.evaluate", "tersely.pipeline.run", "tersely.diagnose.diagnose"):
        monkeypatch.setattr(module, None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    given = {"model": model_folder(), "small": compressed(), "text": text_file, "free": tmp_path / "free"}
    for name, message in (NO_FILE if command in FILES else NO_FOLDER).items():
        words = (FILES | FOLDERS)[command].split()
        place = tmp_path / name
        refused(message.format(place=place), *(word.format(place=place, **given) for word in words))


def test_a_card_that_cannot_be_written_is_refused_before_any_work(
    refused, compressed, text_file, tmp_path, monkeypatch, locked_up
):
    shutil.copytree(compressed(), locked_up, dirs_exist_ok=True)
    monkeypatch.setattr("tersely.pipeline.evaluate", None)
    refused("--card .*nothing may be written in .*locked", "eval", locked_up, "--text", text_file, "--card")


def test_json_that_holds_something_else_is_no_place_for_rows(refused, model_folder, text_file, tmp_path):
    for content in ("{}", "[]", "no json"):
        (tmp_path / "diary.json").write_text(content)
        asked = ["--text", text_file, "--calibrate", text_file, "--json", tmp_path / "diary.json"]
        refused(r"diary\.json holds no rows of a bench", "bench", "low-rank", model_folder(), *asked)


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_second_run_in_the_same_folder_is_refused(fresh, refused, usual, model_folder, tmp_path):
    out = tmp_path / "out"
    message = "out: another run is at work in it; let that one end, stop it, or choose another folder"
    with Journal(out, "of the one that works").alone():
        refused(message, "compress", model_folder(), out, "--method", "svd_llm", "--keep", "0.6", *usual, *fresh)


def test_a_second_run_that_got_ready_first_is_refused_too(tersely_, usual, model_folder, tmp_path, monkeypatch):
    """Whoever begins first works."""
    out, ready = tmp_path / "out", prepare.prepare
    works = Journal(out, "of the one that works").alone()

    def another_begins(*arguments: Any, **keywords: Any) -> prepare.Prepared:
        prepared = ready(*arguments, **keywords)
        works.__enter__()
        return prepared

    monkeypatch.setattr(prepare, "prepare", another_begins)
    status, _, err = tersely_("compress", model_folder(), out, "--method", "svd_llm", "--keep", "0.6", *usual)
    works.__exit__(None, None, None)
    assert status == 2
    assert "another run is at work in it" in err
    assert [path.name for path in out.rglob("*")] == [".tersely", "lock"]


def test_a_full_disk_is_noticed_before_anything_is_written(refused, usual, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    flags = ["--method", "svd_llm", "--keep", "0.6", *usual]
    refused(
        r"the run needs \d+ bytes on disk at its peak, 1000 are free",
        "compress",
        model_folder(),
        tmp_path / "out",
        *flags,
    )


STEP = '[[step]]\nmethod = "svd"\nkeep = 0.6\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"recipe\.toml: no such file"),
        ("[[step", r"recipe\.toml: not TOML"),
        ("keep = 0.6\n" + STEP, r"unknown key 'keep'"),
        ("sed = 1\n" + STEP, r"unknown key 'sed'; did you mean 'seed'"),
        ("[calibration]\nsampels = 3\n" + STEP, r"unknown key 'sampels'; did you mean 'samples'"),
        (STEP + "allocat = 'greedy'\n", r"method svd: unknown option 'allocat'; did you mean 'allocate'"),
        ("seed = 'zero'\n" + STEP, r"seed: .*came: 'zero'"),
        ("shard_size = 'big'\n" + STEP, "size 'big'"),
        ("seed = 1\n", "step"),
        ("step = []\n", "a recipe without a step does nothing"),
        ("[step]\nmethod = 'svd'\nkeep = 0.6\n", r"step"),
        ("[[step]]\nkeep = 0.6\n", "step 1: wanted exactly one of method"),
        (STEP + "[[step]]\nmethod = 'svdd'\nkeep = 0.5\n", r"unknown method 'svdd'; did you mean 'svd'"),
    ],
)
def test_recipes_that_are_wrong_are_refused(content, message, refused, model_folder, tmp_path):
    if content is not None:
        (tmp_path / "recipe.toml").write_text(content)
    refused(message, "compress", model_folder(), tmp_path / "out", "--recipe", tmp_path / "recipe.toml")


def test_what_is_wrong_with_a_later_step_is_said_before_the_first_one_runs(refused, usual, model_folder, tmp_path):
    for later, message in (
        ("target = ['mpl']\nkeep = 0.5", "unknown target 'mpl'"),
        ("target = ['attention']\nkeep = 1e-5", "smallest"),
    ):
        first = '[[step]]\nmethod = "svd"\nkeep = 0.6\ntarget = ["mlp"]\n'
        (tmp_path / "recipe.toml").write_text(f"{first}[[step]]\nmethod = 'svd'\n{later}\n")
        refused(message, "compress", model_folder(), tmp_path / "out", "--recipe", tmp_path / "recipe.toml", *usual)


def test_flags_of_a_step_beside_a_recipe_are_refused(refused, model_folder, tmp_path):
    (tmp_path / "recipe.toml").write_text(STEP)
    flags = ["--recipe", tmp_path / "recipe.toml", "--method", "svd", "--keep", "0.5"]
    refused("--method, --keep and --recipe", "compress", model_folder(), tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval {model} --text {short}", r"short\.txt.*3 tokens"),
        ("eval {model} --text {text} --length 65", "beyond the model's context of 64"),
        ("eval {model} --text {text} --length 16 --stride 17", "stride"),
        ("eval {model} --text nowhere.txt", "no such file"),
        ("eval {short} --text {text}", "no such folder"),
        ("eval {model} --text {text} --against {bert}", "BertForMaskedLM"),
        ("eval {bert} --text {text}", "BertForMaskedLM"),
        ("eval {model} --text {text} --dtype float8", "float8"),
        ("eval {model} --text {text} --device cdua", "device 'cdua'"),
        ("verify {model}", r"no checksums\.json; tersely did not write it"),
        ("verify {short}", "no such folder"),
        ("generate {model} --prompt w5 --tokens 0", "--tokens 0; wanted 1 or more"),
        ("generate {model} --prompt w5 --temperature -1", "--temperature -1.0; wanted 0 or more"),
        ("generate {model} --prompt w5 --temperature nan", "--temperature nan; wanted 0 or more, a finite number"),
        ("generate {model} --prompt w5 --temperature inf", "--temperature inf; wanted 0 or more, a finite number"),
        ("generate {model} --prompt w5 --seed -3", r"--seed -3; wanted 0 or more, below 2\^63"),
        ("generate {model} --prompt w5 --tokens 64", "beyond the model's context behind this prompt; give 63 or less"),
        ("eval {model} --text {text} --questions 3", "--questions 3 without --tasks; name tasks, or leave it out"),
        ("eval {model} --tasks none.jsonl", r"task 'none\.jsonl': no such file; give a file of questions"),
        ("eval {model} --tasks mine=none", "task 'mine=none': no such file"),
        ("diagnose {model} --text {text} --samples 0", "samples = 0; wanted 1 or more windows"),
        ("diagnose {model} --text {text} --seed -3", "--seed -3; wanted 0 or more"),
        ("generate {bert} --prompt w5", "BertForMaskedLM does not generate"),
        ("generate {short} --prompt w5", "no such folder"),
        ("generate {model} --prompt w5 --dtype float8", "float8"),
        ("generate {model} --prompt w5 --device cdua", "device 'cdua'"),
    ],
)
def test_the_other_commands_refuse_what_is_wrong(command, message, refused, model_folder, text_file, tmp_path):
    (tmp_path / "short.txt").write_text("w5 w6 w7")
    places = {"model": model_folder(), "bert": model_folder("bert"), "text": text_file, "short": tmp_path / "short.txt"}
    refused(message, *(word.format(**places) for word in command.split()))


def test_an_empty_prompt_is_refused(refused, model_folder):
    refused("--prompt is empty", "generate", model_folder(), "--prompt", "")


def test_a_prompt_that_fills_the_context_is_refused(refused, model_folder):
    prompt = " ".join(["w5"] * 64)
    refused(r"--prompt has 64 tokens, and .* context of 64 has no room", "generate", model_folder(), "--prompt", prompt)


# --- failed midway ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        NumericalError("a number is not finite"),
        OSError(28, "No space left on device"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_run_that_fails_midway_can_be_gone_on_with(failure, tersely_, usual, model_folder, tmp_path, monkeypatch):
    command = ["compress", model_folder(), tmp_path / "out", "--method", "svd_llm", "--keep", "0.6", *usual]
    cut_site, cut = sweeps._cut, []

    def fails_at_last(*arguments: Any) -> None:
        cut.append(cut_site(*arguments))
        if len(cut) > 8:  # in the second block
            raise failure

    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "_cut", fails_at_last)
        status, _, err = tersely_(*command)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    kept = f"what is finished is kept, go on with: {shlex.join(['tersely', *map(str, command)])}"
    assert line.endswith(("the same command would end here again, so change it", kept))
    if isinstance(failure, KeyboardInterrupt):
        assert line == f"error: interrupted at compressing blocks, 1 of 2 done; {kept}"
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "config.json").exists()
    status, out, _ = tersely_(*command)
    assert status == 0
    assert f"written: {tmp_path / 'out'}" in out
    assert tersely_("verify", tmp_path / "out")[0] == 0
    assert tersely_(*command)[0] == 2


def test_a_recipe_that_is_refused_midway_is_not_to_be_given_again(tersely_, usual, model_folder, tmp_path, monkeypatch):
    def refuses(*arguments: Any) -> None:
        raise tersely.errors.RecipeError("what was asked for cannot be had")

    monkeypatch.setattr(sweeps, "_cut", refuses)
    status, _, err = tersely_("compress", model_folder(), tmp_path / "out", "--method", "svd", "--keep", "0.6", *usual)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line == "error: what was asked for cannot be had; the same command would end here again, so change it"


def test_damage_is_not_to_be_gone_on_with(tersely_, usual, model_folder, tmp_path, monkeypatch):
    command = ["compress", model_folder(), tmp_path / "out", "--method", "svd_llm", "--keep", "0.6", *usual]
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "_cut_in_stream", None)
        assert tersely_(*command)[0] == 1
    (plan,) = (tmp_path / "out").rglob("plan.json")
    for damaged, wanted in ((plan, 1), (tmp_path / "out" / ".tersely" / "run.json", 2)):
        damaged.write_text(damaged.read_text()[:20])
        status, _, err = tersely_(*command)
        assert status == wanted
        line = err.splitlines()[-1]
        assert line.startswith(f"error: {damaged}: damaged (")
        assert line.endswith("nothing can go on from it, start over with --fresh")
    status, _, err = tersely_(*command, "--fresh")
    assert status == 0, err


def test_training_that_is_told_to_end_goes_on_with_the_next_step(
    tersely_, text_file, model_folder, tmp_path, monkeypatch
):
    given = ["--method", "adapter", "--calibrate", text_file, "--length", "16", "--tokens", "1024", "--set"]
    given += ["held_out=2", "batch=4"]
    assert tersely_("train", model_folder(), tmp_path / "whole", *given)[0] == 0
    taken, step = [], loop._Run._step

    def ends_in_the_fifth(run: loop._Run) -> None:
        taken.append(run)
        if len(taken) == 5:
            signal.raise_signal(signal.SIGTERM)
        step(run)

    monkeypatch.setattr(loop._Run, "_step", ends_in_the_fifth)
    status, _, err = tersely_("train", model_folder(), tmp_path / "out", *given)
    assert status == 1
    assert "error: interrupted at training steps, 4 of 16 done; what is finished is kept, go on with: " in err
    status, _, err = tersely_("train", model_folder(), tmp_path / "out", *given)
    assert status == 0, err
    assert len(taken) == 5 + 16 - 4
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_an_interrupt_before_work_begins_is_told(tersely_, model_folder, tmp_path, monkeypatch):
    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tersely.prepare.prepare", interrupted)
    command = ["compress", str(model_folder()), str(tmp_path / "o u t"), "--method", "svd", "--keep", "0.6"]
    status, out, err = tersely_(*command)
    said = f"interrupted; go on with: {shlex.join(['tersely', *command])}"
    assert (status, out, err) == (1, "", f"error: {said}\n")
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_it_went_wrong(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(application, "debugging", False)
    with pytest.raises(tersely.errors.RecipeError, match="unknown method"):
        cli.main(["--debug", "compress", str(model_folder()), str(tmp_path / "out"), "--method", "no", "--keep", "0.5"])


# --- compress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_keep_is_a_share_of_the_bytes_of_what_is_touched(keep, tersely_, usual, model_folder, tmp_path):
    flags = ["--method", "svd_llm", "--keep", keep, "--target", "mlp", "attention.v", *usual]
    status, out, err = tersely_("compress", model_folder(), tmp_path / "out", *flags)
    assert status == 0
    touched = reading(tmp_path / "out", "touched weights")
    assert touched["before"] == 4 * 2 * (3 * 44 * 32 + 16 * 32)
    assert keep - 0.05 < touched["value"] / touched["before"] <= keep
    on_disk = load_file(tmp_path / "out" / WEIGHTS)
    ours = [tensor for name, tensor in on_disk.items() if ".mlp." in name or ".v_proj." in name]
    assert touched["value"] == sum(tensor.nbytes for tensor in ours)
    assert reading(tmp_path / "out", "parameters")["value"] == sum(tensor.numel() for tensor in on_disk.values())
    assert reading(tmp_path / "out", "checkpoint")["value"] == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert "touched weights" in out
    assert "compressing blocks: 2 of 2" in err


@pytest.mark.parametrize("bits", [24, 12.5, 6])
def test_bits_are_an_average_over_what_is_touched(bits, tersely_, usual, model_folder, tmp_path):
    status, _, _ = tersely_("compress", model_folder(), tmp_path / "out", "--method", "svd", "--bits", bits, *usual)
    assert status == 0
    row = reading(tmp_path / "out", "bits per touched weight")
    assert row["before"] == 32
    assert bits - 1.5 < row["value"] <= bits
    stored = [
        t for name, t in load_file(tmp_path / "out" / WEIGHTS).items() if ".self_attn." in name or ".mlp." in name
    ]
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 44 * 32)
    assert row["value"] == pytest.approx(8 * sum(tensor.nbytes for tensor in stored) / weights)


@pytest.mark.parametrize("size", ["400KB", "600kb", "0.8MB", "5GB"])
def test_size_is_that_of_the_whole_folder(size, tersely_, usual, model_folder, tmp_path):
    model = model_folder(hidden_size=96, intermediate_size=256)
    whole = sum(path.stat().st_size for path in model.iterdir())
    status, _, err = tersely_("compress", model, tmp_path / "out", "--method", "svd", "--size", size, *usual)
    assert status == 0, err
    bytes_ = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    wanted = {"400KB": 400_000, "600kb": 600_000, "0.8MB": 800_000, "5GB": 5 * 10**9}[size]
    assert bytes_ <= wanted
    assert bytes_ > 0.75 * min(wanted, whole)


def test_a_recipe_of_two_steps(tersely_, usual, model_folder, tmp_path):
    """The second step touches what the first one left alone; what took effect is a recipe that does it again."""
    (tmp_path / "recipe.toml").write_text("""
        seed = 3
        [[step]]
        method = "svd_llm"
        target = ["mlp"]
        keep = 0.5
        damping = 1e-4
        [[step]]
        method = "svd"
        target = ["attention"]
        keep = 0.8
        allocate = "uniform"
    """)
    out, again = tmp_path / "out", tmp_path / "again"
    status, _, err = tersely_("compress", model_folder(), out, "--recipe", tmp_path / "recipe.toml", *usual)
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    by_step = [[site for site in report["sites"] if site["step"] == step] for step in (0, 1)]
    assert [{site["method"] for site in sites} for sites in by_step] == [{"svd_llm"}, {"svd"}]
    assert [{site["role"].partition(".")[0] for site in sites} for sites in by_step] == [{"mlp"}, {"attention"}]
    for sites, keep in zip(by_step, (0.5, 0.8), strict=True):
        share = sum(site["nbytes"] for site in sites) / sum(site["dense_bytes"] for site in sites)
        assert keep - 0.1 < share <= keep
    assert report["coverage"].startswith("14 of 15 linears touched, 1 kept: 1 output head")
    assert len(json.loads((out / "plan.json").read_text())["steps"]) == 2

    written = tomllib.loads((out / "recipe.toml").read_text())
    assert written["seed"] == 3
    assert written["dtype"] == "float32"
    assert [step["propagate"] for step in written["step"]] == ["block", "block"]
    assert written["step"][0]["damping"] == 1e-4
    said = {"samples": 4, "length": 16, "order": "random", "own_text": 0.0}
    assert written["calibration"] | {"source": []} == {"source": [], **said}
    status, _, err = tersely_("compress", model_folder(), again, "--recipe", out / "recipe.toml")
    assert status == 0, err
    for name in (WEIGHTS, "config.json", "plan.json", "recipe.toml"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    assert tersely_("verify", out)[0] == 0


def test_flags_add_to_a_recipe(tersely_, usual, model_folder, tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "nowhere"\nseed = 3\n[calibration]\nsamples = 99\n' + STEP)
    flags = ["--seed", "5", "--dtype", "bfloat16", *usual]
    status, _, err = tersely_(
        "compress", model_folder(), tmp_path / "out", "--recipe", tmp_path / "recipe.toml", *flags
    )
    assert status == 0, err
    written = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())
    assert (written["model"], written["seed"], written["dtype"]) == (str(model_folder()), 5, "bfloat16")
    assert written["calibration"]["samples"] == 4


@pytest.mark.parametrize("names", ["of the modules", "foreign"])
def test_a_dry_run_writes_nothing(names, tersely_, usual, model_folder, copy_of, tmp_path):
    model = copy_of(model_folder())
    if names == "foreign":
        torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
        (model / WEIGHTS).unlink()
    before = tree(tmp_path)
    command = ["compress", model, tmp_path / "out", "--method", "svd_llm", "--keep", "0.6", *usual, "--dry-run"]
    status, out, err = tersely_(*command)
    assert status == 0, err
    assert "14 of 15 linears touched" in out
    assert tree(tmp_path) == before
    # nor does it disturb, or go on with, what is unfinished
    (tmp_path / "out" / ".tersely").mkdir(parents=True)
    (tmp_path / "out" / ".tersely" / "run.json").write_text('{"fingerprint": "of another one"}')
    before = tree(tmp_path)
    status, _, err = tersely_(*command)
    assert status == 2
    assert "unfinished run of another recipe" in err
    tersely_(*command, "--fresh")
    assert tree(tmp_path) == before


def test_too_little_calibration_is_said(tersely_, text_file, model_folder, tmp_path):
    flags = ["--method", "svd_llm", "--keep", "0.6", "--calibrate", text_file, "--length", "16", "--samples", "2"]
    status, _, err = tersely_("compress", model_folder(), tmp_path / "out", *flags)
    assert status == 0
    said = "32 calibration tokens for inputs of width 44: 0.7 per channel"
    assert f"warning: {said}" in err
    assert said in json.loads((tmp_path / "out" / "report.json").read_text())["warnings"][0]
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_windows_are_written_down_as_many_as_there_were(tersely_, text_file, model_folder, tmp_path):
    """And what is written does the same again, refinement too, on a text of its own."""
    (tmp_path / "short.txt").write_text(" ".join(WORDS * 2))  # 114 tokens
    flags = ["--calibrate", tmp_path / "short.txt", "--length", "16", "--samples", "40"]
    (tmp_path / "recipe.toml").write_text(STEP + f"[step.refine]\nepochs = 1\ntext = ['{text_file}']\n")
    model, out, again = model_folder(), tmp_path / "out", tmp_path / "again"
    status, _, err = tersely_("compress", model, out, "--recipe", tmp_path / "recipe.toml", *flags)
    assert status == 0, err
    written = tomllib.loads((out / "recipe.toml").read_text())
    assert (written["calibration"]["samples"], written["step"][0]["refine"]["samples"]) == (7, 40)
    assert json.loads((out / "report.json").read_text())["recipe"]["calibration"]["samples"] == 7
    assert tersely_("compress", model, again, "--recipe", out / "recipe.toml")[0] == 0
    for name in ("recipe.toml", WEIGHTS):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_what_is_measured_along_the_way_is_reported(tersely_, usual, text_file, model_folder, tmp_path):
    out = tmp_path / "out"
    flags = ["--method", "svd_llm", "--keep", "0.6", *usual, "--evaluate", text_file]
    status, printed, _ = tersely_("compress", model_folder(), out, *flags)
    assert status == 0
    (measured,) = json.loads((out / "report.json").read_text())["evaluation"]["texts"]
    assert measured["kl"] > 0
    assert f"{measured['perplexity']:.3f}" in printed
    assert f"{measured['perplexity']:.3f}" in (out / "README.md").read_text()
    assert f"{measured['perplexity']:.3f}" in (out / "report.html").read_text()


def test_statistics_are_kept_where_they_are_wanted(tersely_, usual, model_folder, tmp_path, monkeypatch):
    flags = ["--method", "svd_llm", "--set", "propagate=none", "--statistics", tmp_path / "statistics", *usual]
    assert tersely_("compress", model_folder(), tmp_path / "one", "--keep", "0.6", *flags)[0] == 0
    for module in (job, sweeps):
        monkeypatch.setattr(module, "Replay", None)
    status, _, err = tersely_("compress", model_folder(), tmp_path / "two", "--keep", "0.4", *flags)
    assert status == 0, err


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_are_set(tersely_, model_folder, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for count in (2, 1):
        assert tersely_("generate", model_folder(), "--prompt", "w5", "--tokens", "1", "--threads", count)[0] == 0
        assert torch.get_num_threads() == count


# --- eval, verify, generate -------------------------------------------------------------------------------------------

PROTOCOL = {"text", "sha256", "length", "stride", "first_token", "dtype", "tokens", "windows"}


def test_eval_writes_the_json_that_others_read(tersely_, compressed, model_folder, text_file, tmp_path):
    (tmp_path / "other.txt").write_text(" ".join(WORDS * 3))
    model, dense = compressed(max_position_embeddings=256), model_folder(max_position_embeddings=256)
    asked = ["--text", text_file, tmp_path / "other.txt", "--length", "32", "--windows", "4"]

    status, printed, err = tersely_("eval", dense, *asked, "--json", tmp_path / "alone.json")
    assert status == 0, err
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert alone.keys() == {"model", "bytes", "parameters", "texts"}
    assert alone["model"] == str(dense)
    assert alone["bytes"] == sum(path.stat().st_size for path in dense.iterdir())
    assert alone["parameters"] == sum(parameter.numel() for parameter in tersely.load(dense).parameters())
    assert [text["text"] for text in alone["texts"]] == [str(text_file), str(tmp_path / "other.txt")]
    for text in alone["texts"]:
        assert text.keys() == PROTOCOL | {"perplexity", "perplexity_interval"}
        assert (text["length"], text["stride"], text["dtype"]) == (32, 32, "float32")
        assert text["tokens"] == 31 * text["windows"]
        assert f"{text['perplexity']:.4f}" in printed

    # The dense model that a folder was made from is found, or named.
    for against in ([], ["--against", dense]):
        status, _, err = tersely_("eval", model, *asked, *against, "--speed", "--json", tmp_path / "beside.json")
        assert status == 0, err
        assert (f"dense model it was made from: {dense}" in err) == (not against)
        beside = json.loads((tmp_path / "beside.json").read_text())
        assert beside.keys() == {"model", "bytes", "parameters", "texts", "speed"}
        medians = {"prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes"}
        assert medians <= beside["speed"].keys()
        assert all(beside["speed"][key] > 0 for key in medians)
        for text, before in zip(beside["texts"], alone["texts"], strict=True):
            intervals = {"perplexity_interval", "perplexity_ratio_interval", "kl_interval"}
            assert text.keys() == PROTOCOL | {"perplexity", "dense_perplexity", "kl", "top1"} | intervals
            assert text["dense_perplexity"] == pytest.approx(before["perplexity"], rel=1e-6)
            assert text["kl"] > 0
            assert 0 <= text["top1"] <= 1


def test_verify_says_what_it_checked(tersely_, compressed, copy_of):
    status, out, _ = tersely_("verify", compressed())
    assert status == 0
    assert re.findall(r"^(\w+)\s+(\w+):", out, flags=re.MULTILINE) == [
        ("ok", "checksums"),
        ("ok", "manifest"),
        ("ok", "weights"),
        ("ok", "reopens"),
    ]
    damaged = copy_of(compressed())
    (damaged / "tokenizer_config.json").write_text("{}")
    status, out, err = tersely_("verify", damaged)
    assert status == 1
    assert "FAILED" in out
    assert "tokenizer_config.json" in out
    assert "Traceback" not in err


def test_generate_continues_as_the_model_does(tersely_, compressed):
    model = tersely.load(compressed())
    prompt = torch.tensor([[5, 6, 7]])
    numbers = model.generate(prompt, max_new_tokens=10, do_sample=False)[0, 3:].tolist()
    words = " ".join(f"w{number}" for number in numbers if number > 2)
    status, out, _ = tersely_("generate", compressed(), "--prompt", "w5 w6 w7", "--tokens", "10")
    assert status == 0
    assert out.strip() == words
    pieces = list(stream(model, read_tokenizer(compressed()), "w5 w6 w7", 10, 0.0, 0))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == words

    draws = [
        tersely_("generate", compressed(), "--prompt", "w5 w6", "--temperature", "1.5", "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_generate_ends_where_the_context_does_unless_told_how_far_to_go(tersely_, model_folder, monkeypatch):
    from transformers import LlamaForCausalLM

    asked: list[int] = []
    usual = LlamaForCausalLM.generate

    def noted(self: Any, **keywords: Any) -> Any:
        asked.append(keywords["max_new_tokens"])
        return usual(self, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    for model, flags in ((model_folder(), []), (model_folder(), ["--tokens", "9"]),
                         (model_folder(max_position_embeddings=256), [])):  # fmt: skip
        assert tersely_("generate", model, "--prompt", "w5 w6", *flags)[0] == 0
    assert asked == [62, 9, 64]


def test_generate_tells_what_went_wrong_while_it_ran(tersely_, compressed, monkeypatch):
    from transformers import LlamaForCausalLM

    def fails(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fails)
    status, _, err = tersely_("generate", compressed(), "--prompt", "w5")
    assert status == 1
    assert "in the middle" in err


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("eval M --text a b c", "eval M --text a --text b --text c"),
        ("eval --text a M", "eval --text a M"),
        ("eval M --text a b --length 5", "eval M --text a --text b --length 5"),
        ("eval M --length 5 --text a b", "eval M --length 5 --text a --text b"),
        ("eval M --speed --text a b", "eval M --speed --text a --text b"),
        ("eval --speed M --text a b", "eval --speed M --text a --text b"),
        ("--debug eval M --text a b", "--debug eval M --text a --text b"),
        ("compress M O --set a=1 b=2 --method svd", "compress M O --set a=1 --set b=2 --method svd"),
        ("compress M O --fresh --calibrate a b", "compress M O --fresh --calibrate a --calibrate b"),
        ("compress --fresh M O --calibrate a b", "compress --fresh M O --calibrate a --calibrate b"),
        (
            "compress --method svd M O --target mlp attention",
            "compress --method svd M O --target mlp --target attention",
        ),
        ("compress M --method svd O --target a b", "compress M --method svd O --target a --target b"),
        ("compress M O --target a --target b", "compress M O --target a --target b"),
        ("compress --calibrate a M O --target b c", "compress --calibrate a M O --target b --target c"),
        (
            "compress M O --keep=0.5 --calibrate=a --target b c",
            "compress M O --keep=0.5 --calibrate=a --target b --target c",
        ),
        ("compress --keep=0.5 M O --target b c", "compress --keep=0.5 M O --target b --target c"),
        ("compress M O --seed -1 --target b c", "compress M O --seed -1 --target b --target c"),
        ("eval --drift M --tasks a b", "eval --drift M --tasks a --tasks b"),
        ("generate M --prompt text", "generate M --prompt text"),
        ("generate M --prompt compress eval", "generate M --prompt compress eval"),
        ("verify O", "verify O"),
        ("", ""),
    ],
)
def test_an_option_may_take_several_values(given, meant):
    assert cli.spread(given.split()) == meant.split()


def test_several_values_arrive(tersely_, usual, model_folder, tmp_path):
    flags = ["--method", "svd_llm", "--keep", "0.7", *usual, "--target", "mlp.up", "mlp.down", "--set"]
    settings = ["propagate=none", "damping=1e-3", "allocate=uniform"]
    status, _, err = tersely_("compress", model_folder(), tmp_path / "out", *flags, *settings)
    assert status == 0, err
    (step,) = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())["step"]
    assert step == {
        "method": "svd_llm",
        "target": ["mlp.up", "mlp.down"],
        "keep": 0.7,
        "allocate": "uniform",
        "propagate": "none",
        "on_failure": "raise",
        "temper": False,
        "damping": 1e-3,
        "pivot": False,
        "remap": False,
        "update": False,
    }


def test_help_answers_without_loading_anything_heavy():
    script = """
import sys
from tersely.cli import main
for arguments in (["--help"], ["compress", "--help"]):
    try:
        main(arguments)
    except SystemExit as exit_:
        assert not exit_.code
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    panels = [word for word in ("look", "make", "prove", "ship") if re.search(rf"─ {word} ─", done.stdout)]
    assert panels == ["look", "make", "prove", "ship"]
    assert "--calibrate" in done.stdout
