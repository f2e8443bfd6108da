"""What a run would take, from headers alone: bytes, memory, disk, time.

Sizes are exact.  Memory is that of the worst moment of the worst step (`memory`).  Time counts the floating-point
operations of all steps (`operations`) and divides by what this machine reaches on two small probes, a product and an
eigenproblem; expect it within a factor of two.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from tersely.anatomy import Site
from tersely.checkpoint import Source
from tersely.estimate.memory import PROCESS, held, read_texts
from tersely.estimate.operations import EIGH, operations
from tersely.prepare import Examined, examine
from tersely.recipe import MethodStep, Recipe
from tersely.report.rows import format_value
from tersely.text import size_of

PARTS = 20
"""Tensors that a linear becomes at most: integers, and beside them a branch of two factors in integers."""


@dataclass(frozen=True)
class Estimate:
    coverage: str
    roles: dict[str, tuple[int, int]]
    """Role → linears touched, bytes they take now."""
    model_bytes: int
    touched_bytes: int
    budget: int
    """Bytes of the touched weights after the first step, at most."""
    after_bytes: int
    """Of the files of weights after it, at most: what they hold, and their headers."""
    disk_bytes: int
    memory_bytes: int
    seconds: float
    from_configuration: bool
    """No headers were at hand: a hub model, or tensors under foreign names (which a run first loads and renames)."""
    unread: tuple[str, ...]
    """Texts whose size is not known before they are read; memory does not count it."""


def estimate(recipe: Recipe) -> Estimate:
    """Check a recipe as far as headers tell, write nothing, run nothing, and say what it would take."""
    found = examine(recipe, None)
    recipe = found.recipe  # with what it left to methods
    roles: dict[str, tuple[int, int]] = {}
    itemsize = found.source.dtype.itemsize
    for site in _sites(found):
        count, nbytes = roles.get(site.role, (0, 0))
        roles[site.role] = count + 1, nbytes + site.out_features * site.in_features * itemsize
    touched = sum(nbytes for _, nbytes in roles.values())
    whole = found.source.nbytes()
    renamed = whole if found.source.is_outline else 0
    budget = _afterwards(recipe, found, touched)
    return Estimate(
        coverage=found.anatomy.coverage(_sites(found)),
        roles=roles,
        model_bytes=whole,
        touched_bytes=touched,
        budget=budget,
        after_bytes=whole - touched + budget + _headers(found.source, _sites(found)),
        disk_bytes=found.disk_bytes + renamed,
        memory_bytes=max(held(recipe, found), PROCESS + renamed),
        seconds=_seconds(recipe, found),
        from_configuration=found.source.is_outline,
        unread=_unread(recipe, found),
    )


def _sites(found: Examined) -> tuple[Site, ...]:
    """The linears that the first step looks at; all of them where it looks at none."""
    of_targets = [site for target in found.targets for site in target.sites]
    changed = [site for site in found.sites[0] if site in found.anatomy.sites]
    return tuple(dict.fromkeys(of_targets or changed)) or found.anatomy.sites


def _afterwards(recipe: Recipe, found: Examined, touched: int) -> int:
    """Bytes of the touched weights after the first step, at most."""
    if isinstance(recipe.step[0], MethodStep):
        smallest = sum(t.sizes(found.source.dtype.itemsize)[-1].nbytes for t in found.targets)
        return smallest if found.budget is None else found.budget
    return touched


def _headers(source: Source, touched: Sequence[Site]) -> int:
    """Bytes of the headers of files of weights, at most; every linear touched may become so many tensors."""
    digits, names = "9" * len(str(source.nbytes())), {f"{site.name}.weight" for site in touched}
    entry = {"dtype": "F8_E4M3", "shape": [], "data_offsets": [int(digits), int(digits)]}
    total = 0
    for name, stored in source.stored.items():
        changed = name in names
        said = {f"{name}terms.1.down." if changed else name: entry | {"shape": list(stored.shape)}}
        total += len(json.dumps(said)) * (PARTS if changed else 1)
    return total + 1000  # lengths, padding, and what kind of tensors they are


def _unread(recipe: Recipe, found: Examined) -> tuple[str, ...]:
    texts = [*(text for texts in read_texts(recipe, found) for text in texts), *recipe.evaluation.text]
    return tuple(text for text in dict.fromkeys(texts) if size_of(text, "calibration") is None)


def estimate_table(figures: Estimate) -> Table:
    table = Table(title=figures.coverage, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for role, (count, nbytes) in figures.roles.items():
        table.add_row(f"{count} × {role}", format_value(nbytes, "bytes"))
    table.add_section()
    table.add_row("touched weights, now", format_value(figures.touched_bytes, "bytes"))
    table.add_row("touched weights, at most afterwards", format_value(figures.budget, "bytes"))
    table.add_row("whole model, now", format_value(figures.model_bytes, "bytes"))
    table.add_row("whole model, at most afterwards", format_value(figures.after_bytes, "bytes"))
    table.add_section()
    table.add_row("peak memory, about", format_value(figures.memory_bytes, "bytes"))
    table.add_row("disk while it runs, at most", format_value(figures.disk_bytes, "bytes"))
    table.add_row("time, about", _duration(figures.seconds))
    notes = []
    if figures.from_configuration:
        notes.append(
            "from the configuration alone; if the weights are not stored under the modules' names, a run loads the "
            "whole model once to rename them (counted above)"
        )
    if figures.unread:
        notes.append(f"how long {', '.join(figures.unread)} is, is not known before it is read; memory leaves it out")
    if notes:
        table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _seconds(recipe: Recipe, found: Examined) -> float:
    """Operations at the speed of this machine."""
    products, eigen = operations(recipe, found)
    reached = _rate(lambda: _product(512), 2.0 * 512**3)
    return products / reached + eigen / _rate(lambda: _eigen(256), EIGH * 256.0**3)


def _rate(work: Callable[[], object], operations: float) -> float:
    """Operations per second of a small probe, best of five."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return operations / min(times)


def _product(width: int) -> torch.Tensor:
    square = torch.ones(width, width)
    return square @ square


def _eigen(width: int) -> object:
    return torch.linalg.eigh(torch.eye(width, dtype=torch.float64) + 1)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
