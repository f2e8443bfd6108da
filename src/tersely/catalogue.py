"""What there is: every entry of every table, as data and as text for people."""

import ast
import inspect
import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any

from tersely.allocate import ALLOCATORS
from tersely.anatomy import FAMILIES
from tersely.diagnose import DIAGNOSES
from tersely.kinds import KINDS
from tersely.recipe import STEPS
from tersely.stats import STATISTICS
from tersely.tables import TABLES
from tersely.train.objectives import OBJECTIVES

SECTIONS = {
    "method": ("methods", "compress --method NAME; in a recipe: method = NAME"),
    "rewrite": ("rewrites", "compress --method NAME; in a recipe: rewrite = NAME"),
    "cache": ("caches", "compress --method NAME; in a recipe: cache = NAME"),
    "convert": ("conversions", "convert --method NAME; in a recipe: convert = NAME"),
    "train": ("relaxations", "train --method NAME; in a recipe: train = [OBJECTIVE…] and relax = NAME"),
}
"""Verb → key in the catalogue, and how its entries are used."""


def catalogue() -> dict[str, Any]:
    """Every entry of every table; those with options also with paper, what they need, and defaults."""
    plain: dict[str, Any] = {
        key: [_entry(name, kind) for name, kind in TABLES[verb].items()] for verb, (key, _) in SECTIONS.items()
    }
    return plain | {
        "objectives": [{"name": name, "summary": kind.summary} for name, kind in OBJECTIVES.items()],
        "allocators": [{"name": n, "summary": a.summary, "paper": a.paper} for n, a in ALLOCATORS.items()],
        "diagnoses": [{"name": name, "summary": entry.summary} for name, entry in DIAGNOSES.items()],
        "kinds": [{"name": name, "summary": _first_line(kind)} for name, kind in KINDS.items()],
        "families": list(FAMILIES),
    }


PLAIN_SECTIONS = {
    "objectives": "train --objective NAME",
    "allocators": "--set allocate=NAME",
    "diagnoses": "diagnose --what NAME",
    "kinds": "what a part of a model can become",
}


def catalogue_text() -> str:
    """The same for people."""
    content, lines = catalogue(), []
    for key, use in SECTIONS.values():
        lines += ["", f"{key} ({use})"]
        for entry in content[key]:
            options = ", ".join(f"{o['name']} = {o['default']!r}" for o in entry["options"]) or "none"
            needs = f"needs {', '.join(entry['needs']) or 'no calibration'}; options: {options}"
            head = textwrap.wrap(f"  {entry['name']:12}{entry['summary']}", 118, subsequent_indent=" " * 16)
            lines += [*head, *_indented(needs), *_indented(entry["paper"])]
    for key, use in PLAIN_SECTIONS.items():
        lines += ["", f"{key} ({use})"]
        for entry in content[key]:
            lines += textwrap.wrap(f"  {entry['name']:12}{entry['summary']}", 118, subsequent_indent=" " * 16)
    lines += [
        "",
        "model families",
        *textwrap.wrap(", ".join(content["families"]), 78, initial_indent="  ", subsequent_indent="  "),
    ]
    return "\n".join(lines[1:])


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=" " * 14, subsequent_indent=" " * 16)


def methods_page() -> str:
    """The same as a page of the documentation: `docs/methods.md`."""
    content = catalogue()
    lines = ["# What there is", "", "Generated from the tables by `make docs`.", ""]
    for verb, (key, use) in SECTIONS.items():
        lines += [f"## {key.capitalize()}", "", f"`{use}`; keys of the step itself: {_keys(verb)}.", ""]
        for entry in content[key]:
            lines += [f"### `{entry['name']}`", "", f"{_sentence(entry['summary'])} {entry['paper']}.", ""]
            lines += [f"Needs {', '.join(f'`{n}`' for n in entry['needs']) or 'no calibration'}.", ""]
            if entry["options"]:
                lines += ["| option | default | |", "|---|---|---|"]
                lines += [f"| `{o['name']}` | `{o['default']!r}` | {o['help']} |" for o in entry["options"]]
                lines += [""]
    for key, use in PLAIN_SECTIONS.items():
        lines += [f"## {key.capitalize()}", "", f"`{use}`", ""]
        lines += [f"- `{entry['name']}`: {entry['summary']}" for entry in content[key]]
        lines += [""]
    families = ", ".join(f"`{name}`" for name in content["families"])
    return "\n".join([*lines, "## Model families", "", f"{families}."]) + "\n"


def _keys(verb: str) -> str:
    return ", ".join(f"`{f.name}`" for f in fields(STEPS[verb]) if f.name not in ("options", verb))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _entry(name: str, kind: Any) -> dict[str, Any]:
    said = field_docstrings(kind)
    options = [
        {"name": f.name, "type": _type_name(f.type), "default": _default(f), "help": said.get(f.name, "")}
        for f in fields(kind)
    ]
    names = {statistic: key for key, statistic in STATISTICS.items()}
    needs = [names[statistic] for statistic in getattr(kind(), "needs", ())]
    return {"name": name, "summary": kind.summary, "paper": kind.paper, "needs": needs, "options": options}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def field_docstrings(kind: type) -> dict[str, str]:
    """The string literal that follows each field in the source of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    said = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                said[field.target.id] = " ".join(after.value.value.split())
    return said


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _first_line(kind: type) -> str:
    module = inspect.getmodule(kind)
    return (inspect.getdoc(kind) or (module.__doc__ if module else "") or "").strip().partition("\n")[0]
