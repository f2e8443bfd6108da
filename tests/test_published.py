"""Recipes for published tables: each one parses, names what exists, fits its family, and stands in the ledger."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tersely.prepare import examine
from tersely.recipe import read_recipe
from tersely.tables import build, build_allocator

ROOT = Path(__file__).parents[1]
FOLDER, LEDGER = ROOT / "recipes" / "published", ROOT / "docs" / "results" / "published.md"
FILES = sorted(FOLDER.glob("*.toml"))
MODELS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
}

every_recipe = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def ledger_rows():
    """The cells of every row that says whether it was run, with the header of its table."""
    rows, header = [], []
    for line in LEDGER.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif set(line) - set("|-: ") and "run here" in header:
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


@every_recipe
def test_a_published_recipe_names_what_exists(path):
    recipe = read_recipe(path)
    for step in recipe.step:
        build(step)
        if hasattr(step, "allocate"):
            build_allocator(step.allocate)
    assert recipe.model == MODELS[re.match(r"llama-(?:\d-)?\db", path.stem)[0]]
    assert recipe.calibration.length == 2048 and recipe.evaluation.text[0] == "wikitext"


@every_recipe
def test_a_published_recipe_fits_a_model_of_its_family(path, model_folder):
    """All that headers tell, on a small model of the same family; neither its text nor a network is asked."""
    found = examine(replace(read_recipe(path), model=str(model_folder("llama"))), None)
    assert len(found.objects) == len(found.recipe.step) and found.targets


@every_recipe
def test_a_published_recipe_says_what_the_paper_says_and_that_it_was_not_run(path):
    comment = " ".join(
        line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    )
    assert "Not run here" in comment and "WikiText-2 test perplexity (dense" in comment
    assert str(read_recipe(path).step[0].keep) in comment


def test_recipes_and_ledger_name_each_other():
    named = {name for row in ledger_rows() for name in re.findall(r"`([\w.-]+)\.toml`", row["our recipe"])}
    assert named == {path.stem for path in FILES}


def test_the_ledger_says_both_sizes_and_that_nothing_was_run():
    rows = ledger_rows()
    assert len(rows) > len(FILES)
    for row in rows:
        kept, removed = (list(map(float, re.findall(r"[\d.]+", row[key]))) for key in ("kept", "removed"))
        assert len(kept) == len(removed) > 0
        assert all(keep + gone == pytest.approx(1) for keep, gone in zip(kept, removed, strict=True))
        assert row["run here"] == "no"
        # one figure a size, where there are figures
        for key in ("paper", "others"):
            figures = row[key].partition(" (")[0].partition(";")[0]
            if " / " in figures:
                assert len(figures.split(" / ")) == len(kept), (row["system"], figures)
