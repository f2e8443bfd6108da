"""Everything that can be refused before a byte is written.

A recipe that passes here runs: its names exist, its budget can be met, its model opens and is finite, its text has
tokens, its output is free and the disk is large enough.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError

from tersely.allocate import ALLOCATORS, Allocator
from tersely.anatomy import Anatomy, Site, anatomy_of
from tersely.calibrate import Windows, read_windows
from tersely.checkpoint import (
    ForeignNamesError,
    Source,
    carried_files,
    locate,
    open_source,
    outline,
    read_config,
    read_tokenizer,
    rewrite_names,
)
from tersely.errors import CheckpointError, RecipeError, TerselyError, unknown
from tersely.evaluation.perplexity import cut, require_causal
from tersely.journal import Journal
from tersely.methods import METHODS, Method
from tersely.recipe import Recipe, Step
from tersely.sweeps import dense_bytes, size_curves
from tersely.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a folder holds beside the weights, for budgets of the whole folder: headers, manifest and reports, from above.
OVERHEAD, OVERHEAD_PER_SITE = 60_000, 2_000


@dataclass(frozen=True)
class Prepared:
    """A recipe that has passed every check, with everything resolved that it left open."""

    recipe: Recipe
    out: Path
    source: Source
    digest: str
    """Checksum of the model's weights and configuration."""
    anatomy: Anatomy
    tokenizer: "PreTrainedTokenizerBase"
    windows: Windows | None
    """None for data-free methods, unless a text was named to measure their errors on."""
    journal: Journal
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """What the headers of a model say about a recipe."""

    source: Source
    anatomy: Anatomy
    methods: tuple[Method, ...]
    sites: tuple[Site, ...]
    """Targets of the first step; those of later ones are known when the steps before them are done."""
    budget: int
    disk_bytes: int


def examine(recipe: Recipe, rewritten: Path | None) -> Examined:
    """Check a recipe against names, configuration and headers; no tensor is read.

    A checkpoint whose tensors do not bear the modules' names is first loaded and stored in the folder `rewritten` (see
    `checkpoint.rewrite_names`); nothing else is written.  With None it is not: the configuration then says what the
    headers cannot, and of a hub model no weight is downloaded.
    """
    methods = tuple(build_method(step.method, step.options) for step in recipe.step)
    for step in recipe.step:
        build_allocator(step.allocate)
    check_device(recipe.device)
    folder = locate(recipe.model, recipe.revision, weights=rewritten is not None)
    source = _open(folder, recipe, rewritten)
    anatomy = anatomy_of(source.skeleton())
    sites = anatomy.select(recipe.step[0].target)
    for step, method in zip(recipe.step[1:], methods[1:], strict=True):
        # patterns and factors are for what former steps will have made; what stands in the model now is checked now
        roles = [word for word in step.target if "*" not in word and word.count(".") < 2]
        if roles:
            check_budget(step, method, anatomy.select(roles), source)
    budget = check_budget(recipe.step[0], methods[0], sites, source)
    return Examined(source, anatomy, methods, sites, budget, disk_needed(recipe, source, sites))


def prepare(recipe: Recipe, out: Path, *, fresh: bool = False) -> Prepared:
    """Check everything about a recipe.  Raises TerselyError for whatever is wrong with it.

    Nothing is written, except inside `out` for a checkpoint whose tensors must be renamed (see `examine`).
    """
    was_there = out.exists()
    try:
        return _prepare(recipe, out, fresh)
    except TerselyError:
        if not was_there:
            shutil.rmtree(out, ignore_errors=True)  # weights renamed in vain
        raise


def _prepare(recipe: Recipe, out: Path, fresh: bool) -> Prepared:
    folder = locate(recipe.model, recipe.revision)
    config = read_config(folder, trust_remote_code=recipe.trust_remote_code)
    tokenizer = read_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
    if out.exists() and out.resolve() == folder.resolve():
        raise CheckpointError(f"{out} is the model itself; choose another folder for the result")
    above = next(place for place in out.absolute().parents if place.exists())
    if not above.is_dir():
        raise CheckpointError(f"{out}: {above} is a file; choose another place")
    methods = [build_method(step.method, step.options) for step in recipe.step]
    calibrated = any(method.needs for method in methods) or recipe.calibration.source != ["stdlib"]
    texts = [read_text(source, "calibration").sha256 for source in recipe.calibration.source] if calibrated else []
    journal = Journal(out, identity(recipe, folder, texts))
    journal.check(fresh=fresh)
    found = examine(recipe, journal.renamed)
    _check_evaluation(recipe, tokenizer, found)
    windows, warnings = None, list(found.source.warnings())
    if calibrated:
        first_token = tokenizer.bos_token_id if found.anatomy.needs_first_token else None
        if found.anatomy.needs_first_token and first_token is None:
            raise RecipeError(
                f"{folder}: {found.anatomy.family} needs a first token and the tokenizer has no bos_token"
            )
        windows = read_windows(recipe.calibration, tokenizer, config, recipe.seed, first_token)
        warnings += [w for w in (windows.shortage(max(site.in_features for site in found.sites)),) if w]
    _check_disk(out, found.disk_bytes)
    digest = found.source.check_weights()
    resolved = _resolved(recipe, found.methods, found.source, windows)
    return Prepared(resolved, out, found.source, digest, found.anatomy, tokenizer, windows, journal, tuple(warnings))


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method from its name and fields.

    Raises RecipeError for an unknown one of either, or a value of a wrong kind.
    """
    if name not in METHODS:
        raise RecipeError(unknown("method", name, METHODS))
    known = [f.name for f in fields(METHODS[name])]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise RecipeError(f"method {name}: " + unknown("option", option, [*known, *(f.name for f in fields(Step))]))
    try:
        return TypeAdapter(METHODS[name]).validate_json(json.dumps(dict(options)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"method {name}: {place}: {first['msg']} (came: {first.get('input')!r})") from error


def build_allocator(name: str) -> Allocator:
    if name not in ALLOCATORS:
        raise RecipeError(unknown("allocator", name, ALLOCATORS))
    return ALLOCATORS[name]


def budget_bytes(step: Step, sites: Sequence[Site], source: Source) -> int:
    """Bytes that the targets may take.  Raises RecipeError where the asked size leaves them nothing."""
    dense = sum(dense_bytes(site, source) for site in sites)
    if step.keep is not None:
        return int(Fraction(str(step.keep)) * dense)  # 0.8 of 10 bytes is 8, though 0.8 in binary is not
    if step.bits is not None:
        weights = sum(site.out_features * site.in_features for site in sites)
        budget = int(Fraction(str(step.bits)) * weights / 8)
        if budget >= dense:
            now = f"the targets take {8 * dense / weights:g} bits per weight now"
            raise RecipeError(f"bits {step.bits}: {now}; ask for less")
        return budget
    beside = source.nbytes() - dense + sum(path.stat().st_size for path in carried_files(source.carried_from))
    beside += OVERHEAD + OVERHEAD_PER_SITE * len(sites)
    left = (step.size_bytes or 0) - beside
    if left <= 0:
        raise RecipeError(f"size {step.size}: everything but the targets takes {beside} bytes already; ask for more")
    return min(left, dense)


def check_budget(step: Step, method: Method, sites: Sequence[Site], source: Source) -> int:
    """The budget in bytes.  Raises RecipeError for one below the smallest that the method can do."""
    curves, budget = size_curves(sites, method, source), budget_bytes(step, sites, source)
    if not build_allocator(step.allocate).needs_errors:
        build_allocator(step.allocate).divide(curves, budget)
    smallest = sum(curve.options[0].nbytes for curve in curves)
    if smallest > budget:
        dense = sum(curve.dense_bytes for curve in curves)
        raise RecipeError(
            f"step {step.method!r}: a budget of {budget} bytes for the targets, whose smallest form takes {smallest}; "
            f"keep at least {smallest / dense:.4f}"
        )
    return budget


def spills(step: Step, method: Method) -> bool:
    """Whether statistics of the dense model go to disk: observed in sweep 1, they are read again in sweep 2."""
    return step.propagate == "none" and bool(method.needs) and build_allocator(step.allocate).needs_errors


def disk_needed(recipe: Recipe, source: Source, sites: Sequence[Site]) -> int:
    """Bytes on disk at the peak of a run: the result, its blocks in the journal, and what is spilled (from above)."""
    targets = sum(dense_bytes(site, source) for site in sites)
    spilled = any(spills(step, build_method(step.method, step.options)) for step in recipe.step)
    grams = sum({site.reads: 8 * site.in_features**2 for site in sites}.values()) if spilled else 0
    steps = len(recipe.step)
    renamed = source.nbytes() if source.carried_from != source.folder else 0
    return renamed + steps * (source.nbytes() + targets) + grams + OVERHEAD + OVERHEAD_PER_SITE * len(sites)


def identity(recipe: Recipe, folder: Path, texts: Sequence[str]) -> str:
    """What a run is a run of: release, recipe, checksums of its texts, the model's files by name, size, time of
    change."""
    files = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()
    )
    what = (importlib.metadata.version("tersely"), recipe.fingerprint(), list(texts), files)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _open(folder: Path, recipe: Recipe, rewritten: Path | None) -> Source:
    dtype, trust = recipe.dtype, recipe.trust_remote_code
    try:
        return open_source(folder, dtype=dtype, trust_remote_code=trust)
    except ForeignNamesError:
        if rewritten is None:
            return outline(folder, dtype=dtype, trust_remote_code=trust)
        if not (rewritten / "config.json").exists():  # written last: without it an earlier try was cut short
            shutil.rmtree(rewritten, ignore_errors=True)
            _check_disk(rewritten, outline(folder, dtype=dtype, trust_remote_code=trust).nbytes())
            rewrite_names(folder, rewritten, trust_remote_code=trust)
        source = open_source(rewritten, dtype=dtype, trust_remote_code=trust)
        source.carried_from = folder
        return source


def _check_evaluation(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", found: Examined) -> None:
    """A result that cannot be measured as asked must be known before hours of work, not after."""
    asked = recipe.evaluation
    if not asked.text:
        return
    require_causal(found.source.skeleton())
    for text in asked.text:
        cut(
            read_text(text, "evaluation"),
            tokenizer,
            found.source.config,
            length=asked.length,
            first_token=found.anatomy.needs_first_token,
            limit=asked.windows,
        )


def _resolved(recipe: Recipe, methods: Sequence[Method], source: Source, windows: Windows | None) -> Recipe:
    """The recipe with every default that took effect written out."""
    steps = [replace(step, options=asdict(method)) for step, method in zip(recipe.step, methods, strict=True)]  # type: ignore[call-overload]
    calibration = recipe.calibration
    if windows is not None:
        calibration = replace(calibration, length=windows.tokens.shape[1])
    return replace(recipe, step=steps, calibration=calibration, dtype=str(source.dtype).removeprefix("torch."))  # type: ignore[arg-type]


def check_device(device: str) -> None:
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"device {device!r} is not available here ({reason}); cpu always is") from error


def _check_disk(out: Path, needed: int) -> None:
    """Raises CheckpointError if the disk has less free than a run takes; part of it may be there from an earlier
    try."""
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    present = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    if needed - present > free:
        raise CheckpointError(
            f"{out}: the run needs {needed - present} bytes on disk at its peak, {free} are free; free some, or write "
            "to another disk"
        )
