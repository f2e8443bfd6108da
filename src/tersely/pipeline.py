"""From a recipe to a folder, and the same from Python: `compress`, `load`, `evaluate`."""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tersely.anatomy import Anatomy, anatomy_of, model_class, needs_first_token
from tersely.calibrate import StatisticsStore
from tersely.checkpoint import Source, locate, open_source, read_config, read_headers, read_tokenizer, write_model
from tersely.errors import RecipeError, TerselyError
from tersely.evaluation import evaluate as measure
from tersely.evaluation.memory import peak_memory
from tersely.journal import Journal, commit_text
from tersely.prepare import (
    Prepared,
    budget_bytes,
    build_allocator,
    build_method,
    check_device,
    prepare,
    spills,
)
from tersely.recipe import Calibration, Step, parse_size, read_recipe, recipe_from
from tersely.report.card import model_card
from tersely.report.page import page
from tersely.report.rows import Report, Row, SiteRow, size_rows
from tersely.sweeps import Job, Outcome, Progress
from tersely.sweeps import compress as run_sweeps
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
    target: Sequence[str] = ("all",),
    allocate: str = Step.allocate,
    propagate: str = Step.propagate,
    options: Mapping[str, Any] | None = None,
    calibrate: Sequence[str] = ("stdlib",),
    samples: int = Calibration.samples,
    length: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    progress: Progress = quiet,
) -> Result:
    """Compress a model folder (or hub name) with one method into a new folder.

    Exactly one of `keep` (fraction of the targets' bytes), `bits` (per target weight) and `size` (of the whole folder)
    is given.  `options` are the method's own fields.  Raises TerselyError with nothing written for a bad request.
    """
    step = {
        "method": method,
        "keep": keep,
        "bits": bits,
        "size": size,
        "target": list(target),
        "allocate": allocate,
        "propagate": propagate,
        "options": dict(options or {}),
    }
    calibration = {"source": list(calibrate), "samples": samples, "length": length}
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
    """
    folder = locate(str(model))
    check_device(device)
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise RecipeError(f"dtype {dtype!r}; wanted auto, float32, float16 or bfloat16")
    config = read_config(folder, trust_remote_code=trust_remote_code)
    model_on_cpu: Any = model_class(config).from_pretrained(folder, dtype=dtype)
    return model_on_cpu.to(device)


def evaluate(
    model: "str | Path | PreTrainedModel",
    text: str | Sequence[str],
    *,
    against: "str | Path | PreTrainedModel | None" = None,
    length: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    speed: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Perplexity of a model on texts; with `against` also KL divergence and top-1 agreement to that model.

    The fields are those of ``tersely eval --json``; one that was not measured is absent.
    """
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
        against=dense,
        speed=speed,
        folder=folder,
        progress=progress,
    )


def recorded_base(model: str) -> str | None:
    """The local folder that a compressed folder was made from, if it is still there and still holds the same model."""
    recipe = Path(model) / "recipe.toml"
    if not recipe.is_file():
        return None
    asked, report = read_recipe(recipe), json.loads((Path(model) / "report.json").read_text(encoding="utf-8"))
    if not Path(asked.model).is_dir():
        return None
    try:
        found = open_source(Path(asked.model), dtype=asked.dtype).check_weights()
    except TerselyError:
        return None
    return asked.model if found == report["base_sha256"] else None


def run(prepared: Prepared, *, statistics: Path | None = None, progress: Progress = quiet) -> Result:
    """Do what was prepared.  Interrupted at any moment, the same call goes on and ends with the same bytes.

    `statistics`: a folder that keeps statistics of dense models between runs.
    """
    with _full_precision():
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
    journal.begin()
    source, anatomy = prepared.source, prepared.anatomy
    done: list[tuple[Job, Outcome]] = []
    for number in range(len(recipe.step)):
        target = out if number + 1 == len(recipe.step) else journal.folder / f"step-{number}"
        job = _job(prepared, number, source, anatomy, statistics, progress)
        outcome = run_sweeps(job)
        done.append((job, outcome))
        if not (target / "config.json").exists():  # written last: with it the step is done
            write_model(target, source, outcome.replaced, parse_size(recipe.shard_size))
        source = open_source(target, trust_remote_code=recipe.trust_remote_code)
        anatomy = anatomy_of(source.skeleton())
    report = _report(prepared, done, source)
    if recipe.evaluation.text:
        report.evaluation = evaluate(
            out,
            recipe.evaluation.text,
            against=prepared.source.folder,
            length=recipe.evaluation.length,
            windows=recipe.evaluation.windows,
            device=recipe.device,
            trust_remote_code=recipe.trust_remote_code,
            progress=progress,
        )
    report.seconds["everything"] = time.perf_counter() - begun
    report.peak_bytes = peak_memory(torch.device(recipe.device))
    _write_artefacts(prepared, report, done)
    journal.finish()
    return Result(out, report)


def versions() -> dict[str, str]:
    """Of everything that a number may depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONED}


def _job(
    prepared: Prepared, number: int, source: Source, anatomy: Anatomy, statistics: Path | None, progress: Progress
) -> Job:
    step = prepared.recipe.step[number]
    method = build_method(step.method, step.options)
    journal = Journal(prepared.journal.folder / f"work-{number}", prepared.recipe.fingerprint())
    journal.begin()
    sites = anatomy.select(step.target)
    tokens = None if prepared.windows is None else prepared.windows.tokens
    store = None
    if tokens is not None and (statistics is not None or spills(step, method)):
        measured_on = {
            "model": prepared.digest if number == 0 else source.check_weights(),
            "versions": versions(),
            "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "shape": tuple(tokens.shape),
            "dtype": str(source.dtype),
        }
        store = StatisticsStore(statistics or journal.folder, measured_on, shared=statistics is not None)
    return Job(
        source=source,
        anatomy=anatomy,
        sites=sites,
        step=step,
        method=method,
        allocator=build_allocator(step.allocate),
        budget=budget_bytes(step, sites, source),
        windows=tokens,
        device=prepared.recipe.device,
        journal=journal,
        store=store,
        progress=progress,
    )


def _report(prepared: Prepared, done: Sequence[tuple[Job, Outcome]], result: Source) -> Report:
    recipe, anatomy = prepared.recipe, prepared.anatomy
    selected = {site.name for job, _ in done for site in job.sites}
    # a later step may address the parts of what an earlier one left behind: what counts is the linear they came from
    targets = [s for s in anatomy.sites if any(n == s.name or n.startswith(f"{s.name}.") for n in selected)]
    dense = [
        s.name
        for s in targets
        if f"{s.name}.weight" in result.stored and result.stored[f"{s.name}.weight"].shape != (0,)
    ]
    degraded = {site: reason for _, outcome in done for site, reason in outcome.degraded.items()}
    coverage = anatomy.coverage(
        targets, {name: "degraded, left dense" if name in degraded else "left dense by the plan" for name in dense}
    )
    seconds: dict[str, float] = {}
    for _, outcome in done:
        for stage, spent in outcome.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return Report(
        model=recipe.model,
        base_sha256=prepared.digest,
        recipe=asdict(recipe),
        versions=versions(),
        coverage=coverage,
        rows=_sizes(prepared, [s.name for s in targets], result),
        sites=[row for number, (job, outcome) in enumerate(done) for row in _site_rows(job, outcome, number)],
        kept=[asdict(kept) for kept in anatomy.kept],
        degraded=degraded,
        warnings=list(prepared.warnings),
        calibration=None if prepared.windows is None else prepared.windows.describe(),
        seconds=seconds,
    )


def _sizes(prepared: Prepared, targets: Sequence[str], result: Source) -> list[Row]:
    """All readings of the size, before and after, from the headers of what lies on disk."""

    def touched(source: Source) -> int:
        ours = [name for name in source.stored if name.startswith(tuple(f"{t}." for t in targets))]
        return sum(source.stored_bytes(name) for name in ours if not name.endswith(".bias"))

    def parameters(source: Source) -> int:
        return sum(source.elements(name) for name in source.stored)

    weights = sum(s.out_features * s.in_features for s in prepared.anatomy.sites if s.name in set(targets))
    before = prepared.source
    return size_rows(
        (touched(result), touched(before)),
        weights,
        (parameters(result), parameters(before)),
        (weight_file_bytes(prepared.out), weight_file_bytes(before.folder)),
    )


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder, headers included."""
    return sum(file.stat().st_size for file in {stored.file for stored in read_headers(folder).values()})


def _site_rows(job: Job, outcome: Outcome, number: int) -> list[SiteRow]:
    rows = []
    for site in job.sites:
        choice = outcome.plan.choices[site.name]
        done = site.name in outcome.replaced
        rows.append(
            SiteRow(
                name=site.name,
                role=site.role,
                out_features=site.out_features,
                in_features=site.in_features,
                step=number,
                method=job.step.method,
                amount=choice.amount if done else None,
                nbytes=choice.nbytes if done else choice.dense_bytes,
                dense_bytes=choice.dense_bytes,
                predicted_error=choice.relative_error if done else 0.0,
                measured_error=outcome.errors[site.name],
            )
        )
    return rows


def _write_artefacts(prepared: Prepared, report: Report, done: Sequence[tuple[Job, Outcome]]) -> None:
    """Everything in the folder that is no model; the checksums come last."""
    out = prepared.out
    commit_text(out / "recipe.toml", prepared.recipe.to_toml())
    plans = [json.loads(outcome.plan.to_json()) for _, outcome in done]
    commit_text(out / "plan.json", json.dumps({"steps": plans}, indent=1) + "\n")
    commit_text(out / "report.json", report.to_json())
    commit_text(out / "report.html", page(report))
    commit_text(out / "README.md", model_card(report, prepared.source.licence()))
    commit_text(out / CHECKSUMS, json.dumps(checksums(out), indent=1) + "\n")
