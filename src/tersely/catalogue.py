"""What there is: every entry of every table, as data and as text for people."""

import ast
import inspect
import textwrap
from dataclasses import MISSING, fields
from typing import Any

from tersely.allocate import ALLOCATORS
from tersely.anatomy import FAMILIES
from tersely.kinds import KINDS
from tersely.methods import METHODS
from tersely.stats import STATISTICS


def catalogue() -> dict[str, Any]:
    """Methods (with paper, needs, options), allocators, kinds, and families of models."""
    return {
        "methods": [_method(name) for name in METHODS],
        "allocators": [{"name": name, "summary": entry.summary} for name, entry in ALLOCATORS.items()],
        "kinds": [{"name": name, "summary": _first_line(kind)} for name, kind in KINDS.items()],
        "families": list(FAMILIES),
    }


def catalogue_text() -> str:
    """The same for people."""
    content = catalogue()
    lines = ["methods (compress --method NAME --set OPTION=VALUE)"]
    for method in content["methods"]:
        options = ", ".join(f"{o['name']} = {o['default']!r}" for o in method["options"]) or "none"
        lines += [
            f"  {method['name']:10}{method['summary']}",
            f"{'':12}needs {', '.join(method['needs']) or 'no calibration'}; options: {options}",
            f"{'':12}{method['paper']}",
        ]
    for table, use in (("allocators", "--set allocate=NAME"), ("kinds", "what a linear can become")):
        lines += ["", f"{table} ({use})"]
        lines += [f"  {entry['name']:10}{entry['summary']}" for entry in content[table]]
    lines += [
        "",
        "model families",
        *textwrap.wrap(", ".join(content["families"]), 78, initial_indent="  ", subsequent_indent="  "),
    ]
    return "\n".join(lines)


def _method(name: str) -> dict[str, Any]:
    kind = METHODS[name]
    said = field_docstrings(kind)
    options = [
        {"name": f.name, "type": _type_name(f.type), "default": f.default, "help": said.get(f.name, "")}
        for f in fields(kind)  # type: ignore[arg-type]
        if f.default is not MISSING
    ]
    names = {statistic: key for key, statistic in STATISTICS.items()}
    needs = [names[statistic] for statistic in kind().needs]
    return {"name": name, "summary": kind.summary, "paper": kind.paper, "needs": needs, "options": options}


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
