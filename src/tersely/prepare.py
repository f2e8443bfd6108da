"""Everything that can be refused before a byte is written.

A recipe that passes here runs: its names exist, its budget can be met, its model opens and is finite, its text has
tokens, its output is free and the disk is large enough.
"""

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersely import own_text, temper
from tersely.allocate import Learned, Measured
from tersely.anatomy import Anatomy, Site, anatomy_of
from tersely.checkpoint import (
    ForeignNamesError,
    Source,
    carried_files,
    is_here,
    locate,
    open_source,
    outline,
    read_config,
    read_headers,
    read_tokenizer,
    require_weights,
)
from tersely.destination import check_folder
from tersely.errors import CheckpointError, RecipeError, TerselyError
from tersely.evaluation.perplexity import cut, require_causal
from tersely.gating import require_windows
from tersely.gradients import require_head
from tersely.journal import FOLDER, STARTED, Journal, clear_unbegun, reading
from tersely.opening import rewrite_names
from tersely.outlook import Outlook
from tersely.planning import check_ceiling
from tersely.recipe import CacheStep, Calibration, MethodStep, Recipe, RewriteStep, Step, TrainStep
from tersely.refine import Refining
from tersely.sensitivity import Laboratory
from tersely.settings import Refinement
from tersely.stats import Drift, Gram, Statistic, WindowFactors, keyed_by
from tersely.stats.windows import KEPT
from tersely.steps.compressing import OVERHEAD, OVERHEAD_PER_SITE, base_of, budget_bytes, spills, targets_of
from tersely.tables import build, build_allocator, settled
from tersely.targets import Target
from tersely.text import read_text, window_length
from tersely.train.data import hold_out
from tersely.windows import Windows, read_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL_WINDOWS = 2**31
"""As many windows as a text has."""

LOADED = ("config.json", "*.index.json", "*.safetensors", "*.bin")
"""Files of a model that it is loaded from; others are carried along, or of no interest."""

WHOLE, PIECE, PIECES = 2**26, 2**16, 64
"""Bytes of a file up to which `known_by` reads all of it; above, so many pieces of that size."""

PREDICTIONS = ("kl", "loss")
"""What allocators measure on the model's predictions."""


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
    """None for data-free steps, unless a text was named to measure their errors on."""
    texts: Mapping[int, Windows]
    """Number of a step that trains → what it trains on."""
    unseen: Tensor | None
    """Token numbers ``[samples, length]`` that nothing is fitted to but a temperature; None where none is asked for."""
    journal: Journal
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """What the headers of a model say about a recipe."""

    recipe: Recipe
    source: Source
    anatomy: Anatomy
    objects: tuple[Any, ...]
    """What each step names, with its fields."""
    targets: tuple[Target, ...]
    """Of the first step, if that one has a budget; those of later ones are known when the steps before are done."""
    sites: tuple[tuple[Site, ...], ...]
    """What each step acts on; of what steps before leave, names are known and for shapes those of the whole linear."""
    budget: int | None
    disk_bytes: int

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read."""
        return calibrates(self.recipe, self.objects)


def examine(recipe: Recipe, rewritten: Path | None) -> Examined:
    """Check a recipe against names, configuration and headers; no tensor is read.

    A checkpoint whose tensors do not bear the modules' names is first loaded and stored in the folder `rewritten` (see
    `opening.rewrite_names`); nothing else is written.  With None it is not: the configuration then says what the
    headers cannot, and of a hub model no weight is downloaded.
    """
    recipe = settled(recipe)
    objects = tuple(build(step) for step in recipe.step)
    check_device(recipe.device)
    folder = locate(recipe.model, recipe.revision, weights=rewritten is not None)
    if rewritten is not None or Path(recipe.model).expanduser().is_dir():
        require_weights(folder)
    source = _open(folder, recipe, rewritten)
    anatomy = anatomy_of(source.skeleton())
    outlook = Outlook(anatomy, source)
    steps = enumerate(zip(recipe.step, objects, strict=True), start=1)
    sites = tuple(outlook.check(number, step, built) for number, (step, built) in steps)
    writes = recipe.calibration.own_text > 0 and calibrates(recipe, objects)
    if writes or any(isinstance(s, TrainStep) or seeks(s) or predicts(s) or tempers(s) for s in recipe.step):
        require_causal(source.skeleton())
    if writes and any(seeks(step) for step in recipe.step):
        raise RecipeError(
            "calibration: own_text with a perplexity to stay below, which is that of calibration windows: what a model "
            "writes itself it predicts too well; set own_text = 0"
        )
    if any(keyed_by(kind) != "input" for built in objects for kind in getattr(built, "needs", ())):
        require_head(source.skeleton())
    targets: tuple[Target, ...] = ()
    budget = None
    first = recipe.step[0]
    bases = [base_of(step, source) if rewritten is not None or _at_hand(step) else None for step in recipe.step]
    if isinstance(first, MethodStep | CacheStep):
        targets = targets_of(first, anatomy, source, bases[0])
        budget = budget_bytes(first, targets, source)
    return Examined(recipe, source, anatomy, objects, targets, sites, budget, disk_needed(recipe, source, targets))


def _at_hand(step: Step) -> bool:
    """Whether the other checkpoint of a step can be looked at without a download."""
    return isinstance(step, MethodStep) and step.base is not None and is_here(step.base)


def prepare(recipe: Recipe, out: Path, *, fresh: bool = False) -> Prepared:
    """Check everything about a recipe.  Raises TerselyError for whatever is wrong with it.

    Nothing is written, except inside `out` for a checkpoint whose tensors must be renamed (see `examine`).
    """
    check_folder(out)
    was_there, held = out.exists(), (out / FOLDER).exists()
    try:
        return _prepare(recipe, out, fresh)
    except TerselyError:
        if not held:
            clear_unbegun(out, keep=was_there)
        raise


def _prepare(recipe: Recipe, out: Path, fresh: bool) -> Prepared:
    recipe = settled(recipe)
    folder = locate(recipe.model, recipe.revision)
    config = read_config(folder, trust_remote_code=recipe.trust_remote_code)
    tokenizer = read_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
    if out.exists() and out.resolve() == folder.resolve():
        raise CheckpointError(f"{out} is the model itself; choose another folder for the result")
    objects = [build(step) for step in recipe.step]
    calibrated = calibrates(recipe, objects)
    journal = Journal(out, identity(recipe, folder, calibrated=calibrated))
    journal.check(fresh=fresh)
    if fresh:
        shutil.rmtree(journal.renamed, ignore_errors=True)
    found = examine(recipe, journal.renamed)
    _check_evaluation(recipe, tokenizer, found)
    windows, warnings = None, list(found.source.warnings())
    first_token = tokenizer.bos_token_id if found.anatomy.needs_first_token else None
    if found.anatomy.needs_first_token and first_token is None:
        raise RecipeError(f"{folder}: {found.anatomy.family} needs a first token and the tokenizer has no bos_token")
    if calibrated:
        windows = read_windows(recipe.calibration, tokenizer, config, recipe.seed, first_token)
        if windows.own and first_token is None:
            own_text.start_token(tokenizer)
        widest = max((site.in_features for site in found.anatomy.sites), default=0)
        warnings += [w for w in (windows.shortage(widest),) if w]
        if any(learns(step) for step in recipe.step):
            require_windows(windows.tokens)
    texts_of = {
        number: read_windows(
            replace(recipe.calibration, source=sources, own_text=0.0, **_which_windows(recipe, recipe.step[number])),
            tokenizer,
            config,
            recipe.seed,
            first_token,
        )
        for number, sources in enumerate(trained(recipe))
        if sources
    }
    unseen = None
    if windows is not None and any(tempers(step) for step in recipe.step):
        whole = replace(recipe.calibration, samples=ALL_WINDOWS, order="first", own_text=0.0)
        everything = read_windows(whole, tokenizer, config, recipe.seed, first_token).tokens
        unseen, warning = temper.unseen(everything, windows.tokens, *(text.tokens for text in texts_of.values()))
        warnings += [warning] if warning else []
    for number, text in texts_of.items():
        step = recipe.step[number]
        if isinstance(step, TrainStep):
            hold_out(text.tokens, step.held_out)
        elif isinstance(step, MethodStep) and step.refine is not None:
            Refining(step.refine, text.tokens, recipe.seed)
    _check_disk(out, found.disk_bytes)
    digest = found.source.check_weights()
    journal.check_weights(digest)
    first = recipe.step[0]
    if isinstance(first, MethodStep) and first.perplexity is not None and (fresh or not journal.has(STARTED)):
        assert windows is not None  # text is read for every perplexity that is looked for
        laboratory = Laboratory(found.source, found.anatomy, windows.tokens, recipe.device, journal, None, "loss")
        check_ceiling(first.perplexity, laboratory)
    resolved = _resolved(recipe, found.objects, found.source, windows, texts_of)
    return Prepared(
        resolved,
        out,
        found.source,
        digest,
        found.anatomy,
        tokenizer,
        windows,
        texts_of,
        unseen,
        journal,
        tuple(warnings),
    )


def _which_windows(recipe: Recipe, step: Step) -> dict[str, Any]:
    """Of a text to train on: all of them, or for the refinement of blocks, which keeps them in memory, some."""
    if isinstance(step, MethodStep) and step.refine is not None:
        # drawn, not the first ones, which of several texts would be windows of the first
        return {"samples": step.refine.samples or recipe.calibration.samples, "order": "random"}
    return {"samples": ALL_WINDOWS, "order": "first"}


def reads_inputs(recipe: Recipe, objects: Sequence[Any]) -> bool:
    """Whether a method reads statistics, an allocator wants the model measured, or blocks are refined behind others."""
    divided = [step.allocate for step in recipe.step if isinstance(step, MethodStep | CacheStep)]
    refined = any(isinstance(step, MethodStep) and step.refine is not None for step in recipe.step)
    return (
        refined
        or any(seeks(step) or tempers(step) for step in recipe.step)
        or any(getattr(built, "needs", ()) for built in objects)
        or any(build_allocator(name).reads_model for name in divided)
    )


def calibrates(recipe: Recipe, objects: Sequence[Any]) -> bool:
    """Whether calibration text is read: where it is needed, and where it was named to measure errors on."""
    return reads_inputs(recipe, objects) or recipe.calibration.source != ["stdlib"]


def measures(step: Step) -> Measured | None:
    """What the allocator of a step asks the model for."""
    return build_allocator(step.allocate).measures if isinstance(step, MethodStep | CacheStep) else None


def learns(step: Step) -> Learned | None:
    """What the allocator of a step learns on the model."""
    return build_allocator(step.allocate).learns if isinstance(step, MethodStep | CacheStep) else None


def predicts(step: Step) -> bool:
    """Whether the allocator of a step reads the model's predictions."""
    return measures(step) in PREDICTIONS or learns(step) is not None


def seeks(step: Step) -> bool:
    """Whether the budget of a step is a perplexity, for which the model is measured."""
    return isinstance(step, MethodStep) and step.perplexity is not None


def tempers(step: Step) -> bool:
    """Whether the result of a step is scaled by what the model predicts."""
    return isinstance(step, MethodStep) and step.temper


def trained(recipe: Recipe) -> Iterator[list[str]]:
    """The texts that each step trains on; none for steps that do not train."""
    for step in recipe.step:
        asked = step.refine if isinstance(step, MethodStep) else step
        yield (asked.text or recipe.calibration.source) if isinstance(asked, TrainStep | Refinement) else []


def disk_needed(recipe: Recipe, source: Source, targets: Sequence[Target]) -> int:
    """Bytes on disk at the peak of a run: the result, what lies in the journal, and what is spilled (from above)."""
    touched = sum(target.elements for target in targets) * source.dtype.itemsize or source.nbytes()
    sites = [site for target in targets for site in target.sites]
    first = recipe.step[0]
    spilled = isinstance(first, MethodStep | CacheStep) and spills(first, targets)
    length = recipe.calibration.length or window_length(source.config)  # whether it fits is told where text is read
    kinds: set[type[Statistic]] = {Gram, *(kind for target in targets for kind in target.needs)}
    of_inputs = {(site.reads, kind): site for site in sites for kind in kinds if keyed_by(kind) == "input" and spilled}
    statistics = sum(statistic_bytes(kind, site, length) for (_, kind), site in of_inputs.items())
    # those of gradients are gathered at once and always lie on disk
    of_gradients = [kind for kind in kinds if keyed_by(kind) != "input"]
    statistics += sum(statistic_bytes(kind, site, length) for kind in of_gradients for site in dict.fromkeys(sites))
    # the state of the optimiser: the weights it trains, and two moments in float32
    trains = any(isinstance(step, TrainStep) for step in recipe.step)
    training = 3 * 4 * sum(source.elements(n) for n in source.stored) if trains else 0
    renamed = source.nbytes() if source.carried_from != source.folder else 0
    steps = len(recipe.step)
    # what refinement has trained outside of the targets
    refined = source.nbytes() if any(isinstance(s, MethodStep) and s.refine is not None for s in recipe.step) else 0
    made = renamed + steps * (source.nbytes() + touched) + refined
    return made + statistics + training + OVERHEAD + OVERHEAD_PER_SITE * len(sites)


def statistic_bytes(kind: type[Statistic], site: Site, length: int) -> int:
    """Bytes of a statistic of a site, or of its input, in memory and on disk; at most, for windows of that length."""
    width = {"output": site.out_features, "flat": site.out_features * site.in_features}.get(
        keyed_by(kind), site.in_features
    )
    if kind is Drift:
        return 8 * site.out_features * width
    if kind is WindowFactors:
        return 4 * KEPT * min(length, width) * width
    open_window = 8 * length * width if getattr(kind, "by_window", False) else 0
    return sum(tensor.nbytes for tensor in kind(width, "meta").state().values()) + open_window


def identity(recipe: Recipe, folder: Path, *, calibrated: bool) -> str:
    """What a run is a run of: the release, and the recipe with contents in the place of names.

    `folder`: of the model; `calibrated`: whether the calibration texts are read.  Where a model or a text lies, how its
    path is written and when it was last touched do not count.
    """
    texts = [[_checksum_of(text) for text in sources] for sources in trained(recipe)]
    steps = [_by_content(step, read) for step, read in zip(recipe.step, texts, strict=True)]
    source = recipe.calibration.source
    calibration = replace(recipe.calibration, source=[_checksum_of(t) for t in source] if calibrated else source)
    said = replace(recipe, model=known_by(folder), revision=None, step=steps, calibration=calibration)
    what = (importlib.metadata.version("tersely"), said.fingerprint())
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _by_content(step: Step, texts: list[str]) -> Step:
    """A step with the checksums of the texts that it trains on, and what its other checkpoint is known by."""
    if isinstance(step, TrainStep):
        return replace(step, text=texts)
    if isinstance(step, RewriteStep):
        named = step.options.get("adapter")
        adapter = Path(named).expanduser() if isinstance(named, str) and named else None
        known = {} if adapter is None or not adapter.is_dir() else {"adapter": known_by(adapter)}
        return replace(step, options=step.options | known)
    if not isinstance(step, MethodStep):
        return step
    refine = None if step.refine is None else replace(step.refine, text=texts)
    # the output records where the base lies
    base = None if step.base is None else f"{(place := locate(step.base)).resolve()} {known_by(place)}"
    return replace(step, refine=refine, base=base)


def _checksum_of(text: str) -> str:
    return read_text(text, "calibration").sha256


def known_by(folder: Path) -> str:
    """Checksum of what tells a model from others: of the files that matter names, sizes, and contents, of large ones
    the beginning, where headers are, the end, and pieces in between.

    All of the weights are read once for `Source.check_weights`, whose checksum the journal compares as well; reading
    them all a second time, before, would double what taking up a run of a large model costs.  The pieces refuse
    another model at once, and tell bases and checkpoints with foreign names, of which nothing else is compared: no two
    trainings end with the same ones, and pickled files list the checksums of their tensors at the end.
    """
    names = {path.name for path in carried_files(folder)}
    names |= {path.name for pattern in LOADED for path in folder.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for name in sorted(names):
        size = (folder / name).stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with (folder / name).open("rb") as file:
            if size <= WHOLE:
                digest.update(file.read())
                continue
            for number in range(PIECES):
                file.seek(number * (size - PIECE) // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()


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
            making = rewritten.with_name(f"{rewritten.name}.{os.getpid()}")  # no lock is taken before the run begins
            rewrite_names(folder, making, trust_remote_code=trust)
            if (rewritten / "config.json").exists():
                shutil.rmtree(making)
            else:
                making.rename(rewritten)
        with reading(rewritten):
            read_headers(rewritten)
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


def _resolved(
    recipe: Recipe, objects: Sequence[Any], source: Source, windows: Windows | None, texts: Mapping[int, Windows]
) -> Recipe:
    """The recipe with every default that took effect written out, and of windows as many as there were."""
    steps = [replace(step, options=asdict(built)) for step, built in zip(recipe.step, objects, strict=True)]
    for number, step in enumerate(steps):
        if isinstance(step, MethodStep) and step.refine is not None:
            # said, or another text than that of calibration would be cut down to its number when this is run again
            steps[number] = replace(step, refine=replace(step.refine, samples=len(texts[number].tokens)))
    calibration: Calibration = recipe.calibration
    if windows is not None:
        samples, length = windows.tokens.shape
        calibration = replace(calibration, samples=samples + windows.own, length=length)
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
