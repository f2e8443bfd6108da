"""The front page is run: every command and the Python of the README, on the bundled model and local texts."""

import re
import shlex
from pathlib import Path

import pytest

from tersely import demo
from tersely.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = Path(demo.__file__).parent / "assets" / "demo"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("  #")[0] for _, block in BLOCKS for line in block.splitlines() if line.startswith("tersely ")
]
(PYTHON,) = [block for language, block in BLOCKS if language == "python"]


def test_the_commands_of_the_front_page_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [command.split()[1] for command in COMMANDS] == ["plan", "compress", "eval", "verify", "generate"]
    (tmp_path / "held-out.txt").write_text("def answer(question):\n    return 42\n" * 400)
    for command in COMMANDS:
        local = command.replace("meta-llama/Llama-3.2-1B", str(DEMO)).replace("text wikitext", "text held-out.txt")
        local = local.replace("--calibrate wikitext", "--calibrate stdlib --samples 8")
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(local)[1:])
        assert not ended.value.code, f"{command}: {capsys.readouterr().err}"


def test_the_python_of_the_front_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(DEMO)
    (tmp_path / "my-texts.txt").write_text("import this\n\nclass Answer:\n    value = 42\n\n" * 400)
    (tmp_path / "held-out.txt").write_text("def answer(question):\n    return 42\n" * 400)
    names: dict = {}
    exec(compile(PYTHON, "README.md", "exec"), names)
    (text,) = names["rows"]["texts"]
    assert text["perplexity"] > 1 and text["dense_perplexity"] > 1
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_the_make_targets_of_the_front_page_exist():
    targets = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_files_of_docs_that_the_front_page_names_exist():
    named = re.findall(r"`((?:docs|recipes)/[\w./]*)`", README)
    assert len(named) >= 3
    assert [path for path in named if not (ROOT / path).exists()] == []
