"""From a recipe to a folder, and the same from Python: `compress`, `load`, `evaluate`."""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersely import own_text as own
from tersely.anatomy import Site, anatomy_of, model_class, needs_first_token
from tersely.checkpoint import (
    Source,
    check_finite,
    locate,
    open_source,
    read_config,
    read_headers,
    read_tokenizer,
    write_model,
)
from tersely.deltas.folder import open_delta, write_delta
from tersely.errors import RecipeError
from tersely.evaluation import evaluate as measure
from tersely.evaluation import protocol_named
from tersely.job import Clock, PartProgress, Progress, most
from tersely.journal import Journal, commit_text, reading
from tersely.kinds import LinearKind
from tersely.memory import peak_memory
from tersely.opening import load_with_report
from tersely.prepare import Prepared, check_device, prepare
from tersely.recipe import Calibration, MethodStep, Step, parse_size, plain_step, recipe_from, verb_of
from tersely.report.card import model_card
from tersely.report.page import page
from tersely.report.rows import Report, Row, size_rows
from tersely.steps import run_step
from tersely.steps.scene import Done, Scene
from tersely.tables import verb_for
from tersely.text import read_text
from tersely.verify import CHECKSUMS, checksums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSIONED = ("tersely", "torch", "transformers", "safetensors", "numpy")


def quiet(what: str, done: int, total: int) -> None:
    """The progress of nobody watching."""


@dataclass(frozen=True)
class Result:
    """What `compress` returns: the folder and its report."""

    out: Path
    report: Report


def compress(
    model: str | Path,
    out: str | Path,
    *,
    method: str,
    keep: float | None = None,
    bits: float | None = None,
    size: int | str | None = None,
    perplexity: float | None = None,
    base: str | None = None,
    target: str | Sequence[str] | None = None,
    allocate: str | None = None,
    propagate: str | None = None,
    refine: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    calibrate: str | Sequence[str] = ("stdlib",),
    samples: int = Calibration.samples,
    length: int | None = None,
    order: str = Calibration.order,
    own_text: float = Calibration.own_text,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    progress: Progress = quiet,
) -> Result:
    """Compress a model folder (or hub name) with one method, cache or rewrite into a new folder.

    At most one of `keep` (fraction of the targets' bytes), `bits` (per target weight), `size` (of the whole folder) and
    `perplexity` (of calibration windows, to stay below) is given, none where the method's own fields say how small.
    With `base` the difference to that checkpoint is compressed.  `refine` holds fields of `Refinement`: every block is
    then trained towards its dense outputs.  `options` are the method's own fields.  Raises TerselyError with nothing
    written for a bad request.
    """
    said = {
        "keep": keep,
        "bits": bits,
        "size": size,
        "perplexity": perplexity,
        "base": base,
        "target": [target] if isinstance(target, str) else list(target) if target is not None else None,
        "allocate": allocate,
        "propagate": propagate,
        "refine": None if refine is None else dict(refine),
        "options": dict(options or {}),
    }
    step = plain_step(verb_for(method), method, said)
    sources = [calibrate] if isinstance(calibrate, str) else list(calibrate)
    calibration = {"source": sources, "samples": samples, "length": length, "order": order, "own_text": own_text}
    plain = {"model": str(model), "step": [step], "calibration": calibration}
    recipe = recipe_from(plain | {"seed": seed, "dtype": dtype, "device": device})
    return run(prepare(recipe, Path(out)), progress=progress)


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Open a folder or hub model with the class that its configuration names.

    `trust_remote_code` accepts a folder that brings its own code; that code is not run, the library's class is used.
    Raises CheckpointError where weights are damaged, missing, of another shape or not finite.
    """
    folder = locate(str(model))
    check_device(device)
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise RecipeError(f"dtype {dtype!r}; wanted auto, float32, float16 or bfloat16")
    config = read_config(folder, trust_remote_code=trust_remote_code)
    found, _ = load_with_report(folder, model_class(config), dtype=dtype)
    check_finite(folder, found.state_dict())
    model_on_cpu: Any = found
    return model_on_cpu.to(device)


def evaluate(
    model: "str | Path | PreTrainedModel",
    text: str | Sequence[str],
    *,
    against: "str | Path | PreTrainedModel | None" = None,
    length: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    protocol: str | None = None,
    tasks: Sequence[str] = (),
    questions: int | None = None,
    drift: bool = False,
    prompts: Sequence[str] = (),
    speed: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Perplexity of a model on texts; with `against` also KL divergence and top-1 agreement to that model.

    `protocol` is that of a paper's code (`tersely.evaluation.PROTOCOLS`).  `against` may be the JSON of an evaluation,
    too, if that is of the same protocol.  Tasks, drift and prompts are those of `tersely.evaluation.evaluate`.  The
    fields are those of ``tersely eval --json``; one that was not measured is absent.
    """
    recorded = None
    if isinstance(against, str | Path) and Path(against).suffix == ".json":
        recorded, against = Path(against), None
    if protocol is not None and dtype == "auto":
        dtype = protocol_named(protocol).dtype or dtype
    if isinstance(model, str | Path):
        folder = locate(str(model))
        opened = load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    else:
        folder, opened = locate(str(model.name_or_path)), model
    dense: PreTrainedModel | None
    if isinstance(against, str | Path):
        dense = load(against, dtype=opened.dtype, device=device, trust_remote_code=trust_remote_code)
    else:
        dense = against
    return measure(
        opened,
        read_tokenizer(folder, trust_remote_code=trust_remote_code),
        [text] if isinstance(text, str) else list(text),
        length=length,
        stride=stride,
        first_token=needs_first_token(opened.config),
        windows=windows,
        protocol=protocol,
        against=dense,
        recorded=recorded,
        tasks=tasks,
        questions=questions,
        drift=drift,
        prompts=prompts,
        speed=speed,
        folder=folder,
        progress=progress,
    )


def run(prepared: Prepared, *, statistics: Path | None = None, progress: Progress = quiet) -> Result:
    """Do what was prepared.  Interrupted at any moment, the same call goes on and ends with the same bytes.  Raises
    CheckpointError where another run is at work in the same folder.

    `statistics`: a folder that keeps statistics of dense models between runs.
    """
    with prepared.journal.alone(), _full_precision():
        return _run(prepared, statistics, progress)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Statistics and replay are measurements: no TF32, whatever the process has chosen for itself."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def _run(prepared: Prepared, statistics: Path | None, progress: Progress) -> Result:
    begun = time.perf_counter()
    recipe, journal, out = prepared.recipe, prepared.journal, prepared.out
    clock = Clock(recipe.device)
    resumed = journal.begin()
    prepared = _with_own_text(prepared, statistics, clock, progress)
    source = prepared.source
    results: list[Done] = []
    effects: list[dict[str, Any]] = []
    for number, step in enumerate(recipe.step):
        target = out if number + 1 == len(recipe.step) else journal.folder / f"step-{number}"
        told = progress if len(recipe.step) == 1 else PartProgress(progress, f"step {number + 1} of {len(recipe.step)}")
        done = run_step(step, _scene(prepared, number, source, statistics, told))
        results.append(done)
        if not (target / "config.json").exists():  # written last: with it the step is done
            _write(target, source, step, done, parse_size(recipe.shard_size))
        with reading(target):
            read_config(target, trust_remote_code=recipe.trust_remote_code)
            read_headers(target)
        if done.base is None:
            source = open_source(target, trust_remote_code=recipe.trust_remote_code)
        else:
            source = open_delta(target)
        effects.append(_effect(prepared, number, done, source, told, clock))
    report = _report(prepared, results, effects, source)
    report.evaluation = effects[-1].get("evaluation")
    report.resumed = resumed
    report.seconds |= clock.seconds
    report.peak_bytes_by_stage = most(report.peak_bytes_by_stage, clock.peaks)
    report.seconds["everything"] = time.perf_counter() - begun
    report.peak_bytes = peak_memory(torch.device(recipe.device))
    _write_artefacts(prepared, report, results)
    journal.finish()
    return Result(out, report)


def _with_own_text(prepared: Prepared, statistics: Path | None, clock: Clock, progress: Progress) -> Prepared:
    """With the windows that the model is asked to write: those to fit to behind those of the text, and as large a share
    of those that nothing is fitted to."""
    recipe, windows, unseen, source = prepared.recipe, prepared.windows, prepared.unseen, prepared.source
    if windows is None or not windows.own:
        return prepared
    apart = 0 if unseen is None else round(recipe.calibration.own_text * len(unseen))
    shape = windows.own + apart, windows.tokens.shape[1]
    first = prepared.tokenizer.bos_token_id if prepared.anatomy.needs_first_token else None
    depends = prepared.digest, versions(), str(source.dtype), recipe.device, recipe.seed, shape, first

    def write() -> Tensor:
        def told(done: int, total: int) -> None:
            progress("writing text", done, total)

        return own.write(source, prepared.tokenizer, shape, recipe.seed, first, recipe.device, told)

    with clock("write"):
        place = None if statistics is None else statistics / own.file_name(*depends)
        tokens = own.kept(place, prepared.journal, write)
    both = replace(windows, tokens=torch.cat([windows.tokens, tokens[: windows.own]]))
    if unseen is not None:
        numbers = torch.linspace(0, len(unseen) - 1, len(unseen) - apart).round().long()
        unseen = torch.cat([unseen[numbers], tokens[windows.own :]])
    return replace(prepared, windows=both, unseen=unseen)


def _write(folder: Path, source: Source, step: Step, done: Done, shard_bytes: int) -> None:
    if done.base is None:
        write_model(folder, source, done.edit, shard_bytes)
        return
    assert isinstance(step, MethodStep) and step.base is not None  # no other step has a base
    updates = {name: made.below("terms.1") for name, made in done.edit.replaced.items()}
    hub = None if Path(step.base).expanduser().is_dir() else step.base
    write_delta(folder, source, done.base, updates, base_name=hub, shard_bytes=shard_bytes)


def _effect(
    prepared: Prepared, number: int, done: Done, source: Source, progress: Progress, clock: Clock
) -> dict[str, Any]:
    """What one step did to the bytes and, if texts are named, to the quality."""
    recipe = prepared.recipe
    step = recipe.step[number]
    effect: dict[str, Any] = {"step": number, "verb": verb_of(step), "name": step.name}
    effect |= {"bytes": weight_file_bytes(source.folder), "seconds": done.seconds}
    effect |= {"peak_bytes_by_stage": done.peaks, **done.figures}
    if not recipe.evaluation.text:
        return effect
    journal = Journal(prepared.journal.folder / f"work-{number}", recipe.fingerprint())
    contents = [read_text(text, "evaluation").sha256 for text in recipe.evaluation.text]
    asked = f"evaluation-{hashlib.sha256(repr((recipe.evaluation, contents)).encode()).hexdigest()[:16]}.json"
    if not journal.has(asked):
        with clock("evaluate"):
            figures = evaluate(
                source.folder,
                recipe.evaluation.text,
                against=prepared.source.folder,
                length=recipe.evaluation.length,
                windows=recipe.evaluation.windows,
                device=recipe.device,
                trust_remote_code=recipe.trust_remote_code,
                progress=progress,
            )
        journal.write_json(asked, figures)
    return effect | {"evaluation": journal.read_json(asked)}


def versions() -> dict[str, str]:
    """Of everything that a number may depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONED}


def _scene(prepared: Prepared, number: int, source: Source, statistics: Path | None, progress: Progress) -> Scene:
    journal = Journal(prepared.journal.folder / f"work-{number}", prepared.recipe.fingerprint())
    journal.begin()
    windows = None if prepared.windows is None else prepared.windows.tokens

    def measured_on() -> dict[str, Any]:
        assert windows is not None  # nobody asks for statistics of nothing
        return {
            "model": prepared.digest if number == 0 else source.check_weights(),
            "versions": versions(),
            "tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "shape": tuple(windows.shape),
            "dtype": str(source.dtype),
        }

    return Scene(
        number=number,
        source=source,
        anatomy=anatomy_of(source.skeleton()),
        dense=prepared.source,
        windows=windows,
        text=prepared.texts[number].tokens if number in prepared.texts else None,
        unseen=prepared.unseen,
        seed=prepared.recipe.seed,
        device=prepared.recipe.device,
        journal=journal,
        statistics=statistics,
        measured_on=measured_on,
        progress=progress,
    )


def _report(prepared: Prepared, results: Sequence[Done], effects: list[dict[str, Any]], result: Source) -> Report:
    recipe, anatomy = prepared.recipe, prepared.anatomy
    if any(done.edit.settings.get("tie_word_embeddings") is False for done in results):
        anatomy = anatomy.untied()
    selected = {name for done in results for name in done.touched}
    # a later step may address the parts of what an earlier one left behind: what counts is the linear they came from
    sites = (*anatomy.sites, *anatomy.outside)
    targets = [s for s in sites if any(n == s.name or n.startswith(f"{s.name}.") for n in selected)]
    # what trained or was converted may still bear its stock name; what no step put anything in place of was left alone
    changed = {path for done in results for path in (*done.edit.replaced, *done.edit.plain)}
    dense = [s.name for s in targets if not any(_related(s.name, path) for path in changed)]
    degraded = {site: reason for done in results for site, reason in done.degraded.items()}
    coverage = anatomy.coverage(
        targets, {name: "degraded, left dense" if name in degraded else "left dense by the plan" for name in dense}
    )
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for done in results:
        peaks = most(peaks, done.peaks)
        for stage, spent in done.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return Report(
        model=recipe.model,
        base_sha256=prepared.digest,
        recipe=asdict(recipe),
        versions=versions(),
        coverage=coverage,
        rows=[*_sizes(prepared, targets, result), *(row for done in results for row in done.sizes)],
        sites=[row for done in results for row in done.rows],
        kept=[asdict(kept) for kept in anatomy.kept_beside(targets)],
        steps=effects,
        degraded=degraded,
        warnings=list(prepared.warnings),
        calibration=None if prepared.windows is None else prepared.windows.describe(),
        seconds=seconds,
        peak_bytes_by_stage=peaks,
    )


def _related(first: str, second: str) -> bool:
    """Whether two paths are one, or one lies inside the other."""
    return first == second or first.startswith(f"{second}.") or second.startswith(f"{first}.")


def _sizes(prepared: Prepared, targets: Sequence[Site], result: Source) -> list[Row]:
    """All readings of the size, before and after, from the headers of what lies on disk."""

    before = prepared.source

    def touched(source: Source) -> int:
        inside = tuple(f"{site.name}." for site in targets)
        ours = {name for name in source.stored if name.startswith(inside)}
        # a head that a step gives a weight of its own was a table's before
        ours |= {original for name, original in source.ties.items() if name.startswith(inside)}
        # of a folder of differences, what lies in its base is not its own
        ours = {name for name in ours if source.stored[name].file.parent in (source.folder, before.folder)}
        return sum(source.stored_bytes(name) for name in ours if not name.endswith(".bias"))

    def parameters(source: Source) -> int:
        packed = {
            f"{name}.": module.out_features * module.in_features
            for name, module in source.skeleton().named_modules()
            if isinstance(module, LinearKind) and module.packed
        }
        codes = [n for n in source.stored if n.startswith(tuple(packed)) and not n.endswith(".bias")]
        return sum(packed.values()) + sum(source.elements(name) for name in source.stored.keys() - set(codes))

    weights = sum(site.out_features * site.in_features for site in targets)
    return size_rows(
        (touched(result), touched(before)),
        weights,
        (parameters(result), parameters(before)),
        (weight_file_bytes(prepared.out), weight_file_bytes(before.folder)),
    )


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder, headers included."""
    return sum(file.stat().st_size for file in {stored.file for stored in read_headers(folder).values()})


def _write_artefacts(prepared: Prepared, report: Report, results: Sequence[Done]) -> None:
    """Everything in the folder that is no model; the checksums come last."""
    out = prepared.out
    commit_text(out / "recipe.toml", prepared.recipe.to_toml())
    plans = [done.plan for done in results]
    commit_text(out / "plan.json", json.dumps({"steps": plans}, indent=1) + "\n")
    commit_text(out / "report.json", report.to_json())
    commit_text(out / "report.html", page(report))
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    commit_text(out / "README.md", model_card(report, prepared.source.licence(), settings))
    commit_text(out / CHECKSUMS, json.dumps(checksums(out), indent=1) + "\n")
