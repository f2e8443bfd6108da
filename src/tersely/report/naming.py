"""What things are called where people read: rows by their method and what distinguishes them, texts by their file,
models by their name on the hub or the last part of their folder."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tersely.recipe import STEPS

PEER = "peer:"
"""How the method of a row begins that is another package's: its bytes are counted from its format, and no folder has
them."""


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


def named(model: str) -> tuple[str, str | None]:
    """What to call a model, and its name on the hub, if it has one: a local folder is nobody else's business."""
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve().name, None
    return (model, model) if is_hub_name(model) else (folder.name or model, None)


def is_hub_name(model: str) -> bool:
    """Whether the hub could have a model of this name."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return not model.startswith((".", "/", "~"))


def place_of(text: str) -> str:
    """A text, a base: without the folders that it lies in, if it is a file or a folder of this machine."""
    path = text.partition("[")[0]
    is_path = path.startswith(("/", ".", "~")) or re.match(r"[A-Za-z]:[\\/]", path) or Path(path).exists()
    return short_text(text.replace("\\", "/")) if is_path else text
