"""Every entry of every table can be named, built, documented, listed and written down."""

import inspect
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from contract.material import for_every, nothing_changes
from tersely.allocate import ALLOCATORS
from tersely.cache import CACHES
from tersely.catalogue import catalogue, field_docstrings
from tersely.convert import CONVERSIONS
from tersely.diagnose import DIAGNOSES, diagnose
from tersely.kinds import KINDS
from tersely.methods import METHODS, UNIT_METHODS
from tersely.recipe import STEPS, recipe_from, verb_of
from tersely.rewrite import REWRITES
from tersely.stats import STATISTICS
from tersely.tables import TABLES, build
from tersely.train.objectives import OBJECTIVES
from tersely.train.relax import RELAXATIONS

STEPPED: dict[str, tuple[str, Mapping[str, type]]] = {
    "methods": ("method", METHODS),
    "unit methods": ("method", UNIT_METHODS),
    "rewrites": ("rewrite", REWRITES),
    "caches": ("cache", CACHES),
    "conversions": ("convert", CONVERSIONS),
    "relaxations": ("train", RELAXATIONS),
}
"""Tables whose entries are steps of recipes: their verb, and the table."""

ASKED: dict[str, dict[str, Any]] = {
    "method": {"keep": 0.5},
    "rewrite": {},
    "cache": {"keep": 0.5},
    "convert": {},
    "train": {"train": ["tokens"]},
}
"""Verb → what a step of it says beside the name of its entry."""

STEPS_BY_NAME = {name: (verb, name, entry) for verb, table in STEPPED.values() for name, entry in table.items()}
CLASSES = {name: entry for name, (_, _, entry) in STEPS_BY_NAME.items()} | OBJECTIVES

every_class = for_every("entry", CLASSES)
every_step = for_every("step", STEPS_BY_NAME)
every_source = for_every(
    "source",
    {name: (entry.paper, inspect.getmodule(entry)) for name, (_, _, entry) in STEPS_BY_NAME.items()}
    | {name: (entry.paper, inspect.getmodule(entry.look)) for name, entry in DIAGNOSES.items()}
    | {name: (entry.paper, inspect.getmodule(entry.rule)) for name, entry in ALLOCATORS.items() if entry.paper},
)


def step_of(verb: str, name: str, **options: Any) -> dict[str, Any]:
    return {("relax" if verb == "train" else verb): name, **ASKED[verb], **options}


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_means_one_thing():
    """Commands take any of them without the verb."""
    names = [name for _, table in STEPPED.values() for name in table]
    assert len(set(names)) == len(names)
    assert all(
        re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in [*names, *OBJECTIVES, *ALLOCATORS, *DIAGNOSES, *KINDS]
    )


def test_every_table_is_reached_by_a_verb_and_listed():
    for verb, table in STEPPED.values():
        assert table.items() <= TABLES[verb].items()
    assert TABLES.keys() == STEPS.keys()
    assert sum(map(len, TABLES.values())) == sum(len(table) for _, table in STEPPED.values())
    listed = catalogue()
    for key, plain in {
        "objectives": OBJECTIVES,
        "allocators": ALLOCATORS,
        "diagnoses": DIAGNOSES,
        "kinds": KINDS,
    }.items():
        assert {entry["name"] for entry in listed[key]} == plain.keys()
        assert all(entry["summary"].strip() for entry in listed[key])


# --- words ------------------------------------------------------------------------------------------------------------


@every_source
def test_it_names_its_paper_and_its_file_the_source(source):
    paper, module = source
    assert re.match(r"[A-Z].+?, (18|19|20)\d\d, \S", paper), f"{paper!r}: wanted authors, year, title, identifier"
    cited = re.search(r"^Source: (.+?)(\n\n|\Z)", module.__doc__, flags=re.MULTILINE | re.DOTALL)
    assert cited, f"{module.__name__} cites no source on a line of its own"
    assert paper.split()[0] in cited[1], "not the same first author in both"


@every_class
def test_it_says_in_a_line_what_it_is(entry):
    assert entry.summary == " ".join(entry.summary.split())
    assert 10 < len(entry.summary) < 100 and not entry.summary.endswith(".")


@every_class
def test_every_field_says_what_it_is(entry):
    assert {field.name for field in fields(entry)} <= field_docstrings(entry).keys()


# --- objects ----------------------------------------------------------------------------------------------------------


@every_class
def test_defaults_construct_what_cannot_be_changed(entry):
    with nothing_changes():
        built = entry()
    assert built == entry() and hash(built) == hash(entry())
    assert entry.__dataclass_params__.frozen


@every_step
def test_it_says_what_it_needs_in_words_of_the_contract(step):
    _, name, entry = step
    assert set(getattr(entry(), "needs", ())) <= set(STATISTICS.values()), "calibration cannot gather that"
    if hasattr(entry, "roles"):
        assert entry.roles and set(entry.roles) <= {"attention", "mlp", "reads", "depth"}
    if name in METHODS:
        assert isinstance(entry.leaves, tuple) and all(isinstance(leaf, str) for leaf in entry.leaves)


@for_every("step", STEPS_BY_NAME)
def test_a_recipe_with_all_options_written_out_reads_back(step):
    """As a run writes it into its folder."""
    verb, name, entry = step
    asked = recipe_from({"model": "m", "step": [step_of(verb, name)]})
    (said,) = asked.step
    assert verb_of(said) == verb and said.name == name
    assert build(said) == entry()
    options = asdict(entry())
    assert options.keys().isdisjoint({field.name for field in fields(STEPS[verb])} - {"options"}), (
        "an option bears the name of a key of the step, which hides it"
    )
    written = replace(asked, step=[replace(said, options=options)]).to_toml()
    (again,) = recipe_from(tomllib.loads(written)).step
    assert build(again) == entry()


# --- diagnoses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIAGNOSES)
def test_a_diagnosis_changes_nothing_and_returns_plain_rows(name, model_folder, text_file):
    folder = model_folder("llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with nothing_changes():
        found = diagnose(str(folder), [name], [str(text_file)], samples=4, length=16)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    rows = found[name]
    assert rows and found.keys() == {name}
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    for row in rows:
        assert row.keys() == {"name", "measure", "value", "unit"}
        assert row["name"] and row["measure"] and row["unit"] is not None
    assert diagnose(str(folder), [name], [str(text_file)], samples=4, length=16) == found
