"""What things are called on a page: rows by their method and what distinguishes them, texts by their file."""

from collections.abc import Iterator, Mapping
from typing import Any

from tersely.recipe import STEPS


def way(method: str, options: Mapping[str, Any]) -> str:
    """A row's method and what distinguishes it from others of that method, for people."""
    own = {key: value for key, value in options.items() if key not in ("after", "then")}
    steps = [*map(_step_said, options.get("after", [])), _said(method, own), *map(_step_said, options.get("then", []))]
    return " → ".join(steps)


def _step_said(step: Mapping[str, Any]) -> str:
    (verb,) = [verb for verb in STEPS if verb in step]
    own = {key: value for key, value in step.items() if key not in (verb, "relax")}
    if verb != "train":
        return _said(str(step[verb]), own)
    return _said(str(step.get("relax", "adapter")), {"objective": step["train"]} | own)


def _said(name: str, options: Mapping[str, Any]) -> str:
    words = ", ".join(_words(options))
    return f"{name} ({words})" if words else name


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if key in ("allocate", "propagate"):
            yield str(value)
        elif isinstance(value, list | tuple):
            yield f"{key} {' + '.join(map(str, value))}"
        elif isinstance(value, Mapping):
            yield " ".join([*(() if key == "options" else (key,)), *_words(value)])
        else:
            yield f"{key} {value}"


def short_text(source: str) -> str:
    """A text source without the folders it lies in."""
    path, bracket, piece = source.partition("[")
    return path.rstrip("/").rpartition("/")[2] + bracket + piece
