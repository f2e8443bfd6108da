"""The dense model that a folder was made from: found wherever both have gone, and never left out without a word."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tersely.errors import TerselyError
from tersely.origin import dense_model
from tersely.pipeline import compress
from test_steps import command

Folder = Callable[..., Path]


@pytest.fixture
def made(model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``models/dense``, and with ``runs/out`` that was made from it by that relative name."""
    home = tmp_path / "home"
    shutil.copytree(model_folder(), home / "models" / "dense")
    (home / "runs").mkdir()
    monkeypatch.chdir(home)
    compress("models/dense", "runs/out", method="svd", keep=0.6)
    return home


def test_it_is_found_from_anywhere_and_the_record_says_no_more_than_was_given(made, tmp_path, monkeypatch):
    assert dense_model(Path("runs/out")) == (
        Path("models/dense"),
        "beside the dense model it was made from: models/dense",
    )
    assert 'model = "models/dense"' in (made / "runs" / "out" / "recipe.toml").read_text()
    monkeypatch.chdir(tmp_path)
    assert dense_model(made / "runs" / "out")[0] == made / "models" / "dense"
    monkeypatch.chdir(made / "runs" / "out")
    assert dense_model(Path())[0] == made / "models" / "dense"


def test_both_may_be_moved_together(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = made.rename(tmp_path / "elsewhere")
    assert dense_model(moved / "runs" / "out")[0] == moved / "models" / "dense"


def test_another_model_in_its_place_is_not_taken_for_it(made, tmp_path, monkeypatch):
    """Nearer, of the same name: the one farther up is still found."""
    other = Path(shutil.copytree(made / "models" / "dense", made / "runs" / "models" / "dense"))
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] *= 2
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    assert dense_model(made / "runs" / "out")[0] == made / "models" / "dense"
    shutil.rmtree(made / "models")
    found, line = dense_model(made / "runs" / "out")
    assert found is None
    assert "not compared" in line and "models/dense is another model now" in line and "--against" in line


def test_what_is_not_found_is_said_by_eval_in_one_line(made, text_file, tmp_path, monkeypatch, capsys):
    (made / "models").rename(tmp_path / "away")
    asked = ["eval", "runs/out", "--text", text_file, "--length", "16", "--windows", "2", "--json", "ev.json"]
    assert command(*asked) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "dense model" in line]
    assert lines == [
        "not compared with the dense model: it was made from models/dense, which is no folder, seen from here or from "
        "runs/out; say where it is with --against"
    ]
    assert "kl" not in json.loads(Path("ev.json").read_text())["texts"][0]
    assert command(*asked, "--against", "models/dense") == 2
    assert command(*asked, "--against", tmp_path / "away" / "dense") == 0
    assert "kl" in json.loads(Path("ev.json").read_text())["texts"][0]


def test_a_model_that_cannot_be_opened_is_named_with_the_reason(made):
    (made / "models" / "dense" / "model.safetensors").write_bytes(b"")
    found, line = dense_model(Path("runs/out"))
    assert found is None
    assert "model.safetensors: truncated or damaged" in line


def test_records_that_are_gone_are_said_and_damaged_ones_refused(made, model_folder):
    assert dense_model(model_folder()) == (None, "")  # an ordinary folder records nothing
    report = made / "runs" / "out" / "report.json"
    for content in ("{", "[]", '{"model": 3}'):
        report.write_text(content)
        with pytest.raises(TerselyError, match=r"report\.json: .*write it again"):
            dense_model(Path("runs/out"))
    report.unlink()
    found, line = dense_model(Path("runs/out"))
    assert found is None and "has no report.json" in line
