"""Methods side by side: the same model, the same calibration, the same budgets, the same texts.

Every row takes the path that ships: compress to a folder, open the folder, evaluate it beside the dense model.
Statistics of the dense model are gathered once and serve all rows.  Rows are written as they come, and a bench that was
stopped goes on with the first row that is missing.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tersely.errors import RecipeError
from tersely.job import Progress
from tersely.journal import commit_text
from tersely.pipeline import Result, evaluate, load, run, versions
from tersely.prepare import examine, prepare
from tersely.recipe import STEPS, Calibration, Recipe, plain_step, recipe_from
from tersely.report.rows import format_value
from tersely.tables import verb_for
from tersely.text import read_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One way to compress, at several sizes; `steps` come before the one that is named."""

    method: str
    allocate: str | None = None
    propagate: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()
    """Plain values of steps before, as in a recipe."""
    sizes: str | None = "keep"
    """What its sizes are: keep or bits, or None where the entry has a single size."""

    def recipe(self, bench: "Bench", size: float | None) -> Recipe:
        asked = {"allocate": self.allocate, "propagate": self.propagate}
        if self.sizes is not None:
            asked[self.sizes] = size  # type: ignore[assignment]
        step = plain_step(verb_for(self.method), self.method, asked | self.options)
        plain = {
            "model": bench.model,
            "step": [*self.steps, step],
            "calibration": {k: v for k, v in asdict(bench.calibration).items() if v is not None},
            "seed": bench.seed,
            "device": bench.device,
        }
        return recipe_from(plain)

    def folder(self, size: float | None) -> str:
        """A name for the output, unlike that of any other row."""
        content = json.dumps([self.described(), size], sort_keys=True)
        return f"{self.method}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def described(self) -> dict[str, Any]:
        said: dict[str, Any] = {"allocate": self.allocate, "propagate": self.propagate}
        said = {key: value for key, value in said.items() if value is not None} | self.options
        return said | ({"after": list(self.steps)} if self.steps else {})


LOW_RANK = tuple(
    Entry(method, allocate, propagate)
    for method, allocate, propagate in (
        ("svd", "uniform", "none"),
        ("asvd", "uniform", "none"),
        ("svd_llm", "uniform", "none"),
        ("svd_llm", "uniform", "block"),
        ("svd_llm", "uniform", "input"),
        ("svd", "greedy", "none"),
        ("asvd", "greedy", "none"),
        ("svd_llm", "greedy", "none"),
        ("svd_llm", "greedy", "block"),
        ("svd_llm", "greedy", "input"),
        ("svd_llm", "knapsack", "none"),
        ("svd_llm", "lems", "none"),
        ("nsvd", "uniform", "none"),
        ("adasvd", "uniform", "none"),
        ("fwsvd", "uniform", "none"),
        ("kfac_svd", "uniform", "none"),
        ("kfac_svd", "total", "none"),
        ("aa_svd", "uniform", "input"),
        ("aa_svd", "lems", "input"),
        ("modegpt", "uniform", "block"),
    )
)
"""The low-rank systems of this release."""

WIDTHS = (4, 3, 2)

QUANTIZE = tuple(
    Entry(method, propagate=propagate, options={"width": width, **options}, sizes=None, steps=steps)
    for width in WIDTHS
    for method, propagate, options, steps in (
        ("rtn", "none", {}, ()),
        ("rtn", "none", {"grid": "symmetric"}, ()),
        ("gptq", "none", {}, ()),
        ("gptq", "input", {}, ()),
        ("gptq", "input", {}, ({"rewrite": "smooth"},)),
        ("gptq", "input", {}, ({"rewrite": "rotate"},)),
    )
)
"""The weight-only quantizers of this release, at fixed widths of their codes, alone and after a rewrite."""

FACTORS = {"method": "svd_llm", "keep": 0.6}
HEAL = {"objective": ["logits"], "tokens": 300_000, "rate": 2e-3, "options": {"rank": 8}}
NOISE = {"tokens": 300_000, "rate": 5e-4, "quantizer_rate": 0.02, "activations": False}

SHAPES = (
    *(Entry("stat", "uniform", options={"target": ["mlp"], "keep": keep}, sizes=None) for keep in (0.9, 0.75, 0.5)),
    *(
        Entry("latent", options={"keep": keep, "metric": metric}, sizes=None)
        for keep in (0.5, 0.25)
        for metric in ("channels", "gram")
    ),
    Entry("fope", sizes=None),
    Entry("full", options={"tokens": 300_000, "rate": 5e-4}, sizes=None, steps=({"convert": "fope"},)),
    *(Entry("mixed", options={"bits": bits, "allocate": "knapsack"}, sizes=None) for bits in (4.0, 3.0, 2.5)),
    *(Entry("mixed", options={"bits": bits, "allocate": "greedy"}, sizes=None) for bits in (4.0, 3.0, 2.5)),
    Entry("svd_llm", options={"keep": 0.6}, sizes=None),
    Entry("adapter", options=HEAL, sizes=None, steps=(FACTORS,)),
    Entry("kasa", options=HEAL | {"options": {"rank": 8, "truncate": False}}, sizes=None, steps=(FACTORS,)),
    *(Entry("nipq", options=NOISE | {"bits": bits}, sizes=None) for bits in (4.0, 3.0)),
    Entry(
        "adapter",
        options=HEAL | {"options": {"rank": 4}},
        sizes=None,
        steps=(
            {"rewrite": "smooth"},
            {"method": "svd_llm", "keep": 0.8},
            {"method": "gptq", "target": ["*.down", "*.up"], "width": 4, "propagate": "input"},
        ),
    ),
)
"""One system of every shape: units, caches, conversions, relaxations, mixed options, and all of them in a row."""

BENCHES: dict[str, tuple[Entry, ...]] = {"low-rank": LOW_RANK, "quantize": QUANTIZE, "shapes": SHAPES}


@dataclass(frozen=True)
class Bench:
    model: str
    entries: Sequence[Entry]
    keeps: Sequence[float]
    texts: Sequence[str]
    calibration: Calibration
    length: int | None = None
    windows: int | None = None
    seed: int = 0
    device: str = "cpu"


def run_bench(
    bench: Bench, file: Path, command: str, progress: Progress, keep_folders: Path | None = None
) -> list[Row]:
    """All rows, written to `file` (JSON) one by one.  `keep_folders`: where compressed models stay; else they are
    removed.

    Raises RecipeError if `file` holds another bench.
    """
    rows = rows_so_far(file, command)
    work = keep_folders or Path(tempfile.mkdtemp(prefix="tersely-bench-"))
    dense = load(bench.model, device=bench.device)
    jobs = list(_jobs(bench))
    try:
        for number, (entry, size) in enumerate(jobs):
            if not any(_is_row_of(row, entry, size) for row in rows):
                out = work / entry.folder(size)
                if out.exists():  # compressed, but stopped before it was evaluated
                    shutil.rmtree(out)
                result = _compressed(bench, entry, size, out, work / "statistics")
                figures = evaluate(
                    out,
                    list(bench.texts),
                    against=dense,
                    length=bench.length,
                    windows=bench.windows,
                    device=bench.device,
                    progress=progress,
                )
                rows += _rows(entry, size, result, figures)
                commit_text(file, json.dumps(bench_content(command, rows), indent=1) + "\n")
                if keep_folders is None:
                    shutil.rmtree(out)
            progress("rows", number + 1, len(jobs))
    finally:
        if keep_folders is None:
            shutil.rmtree(work)
    return rows


def check_bench(bench: Bench, file: Path, command: str) -> None:
    """Raises TerselyError for whatever would stop a bench; reads headers and texts, writes nothing."""
    if not file.absolute().parent.is_dir():
        raise RecipeError(f"{file}: no such folder; make it first")
    rows_so_far(file, command)
    for text in bench.texts:
        read_text(text, "evaluation")
    for source in bench.calibration.source:
        read_text(source, "calibration")
    for entry, size in _jobs(bench):
        examine(entry.recipe(bench, size), None)


def _jobs(bench: Bench) -> Iterator[tuple[Entry, float | None]]:
    """Every entry at every one of its sizes; those of one size stand together."""
    for number, keep in enumerate(bench.keeps):
        for entry in bench.entries:
            if entry.sizes is not None:
                yield entry, keep
            elif number == 0:
                yield entry, None


def _compressed(bench: Bench, entry: Entry, size: float | None, out: Path, statistics: Path) -> Result:
    return run(prepare(entry.recipe(bench, size), out), statistics=statistics)


def _rows(entry: Entry, size: float | None, result: Result, figures: dict[str, Any]) -> Iterator[Row]:
    sizes = {row.name: row for row in result.report.rows}
    errors = [site.measured_error for site in result.report.sites if site.measured_error is not None]
    for text in figures["texts"]:
        yield {
            "method": entry.method,
            "options": entry.described(),
            **({} if entry.sizes is None else {entry.sizes: size}),
            "text": text["text"],
            "perplexity": text["perplexity"],
            "dense_perplexity": text["dense_perplexity"],
            "kl": text["kl"],
            "top1": text["top1"],
            "bytes": figures["bytes"],
            "touched_bytes": sizes["touched weights"].value,
            "bits_per_weight": sizes["bits per touched weight"].value,
            "mean_error": sum(errors) / len(errors) if errors else None,
            "left_dense": sum(site.amount is None for site in result.report.sites),
            "seconds": result.report.seconds["everything"],
            # the first row that needs a statistic pays for its replay; the stages tell what a method itself takes
            "stages": result.report.seconds,
            "trained_on": _trained_on(result),
            "protocol": {
                key: text[key] for key in ("sha256", "length", "stride", "first_token", "dtype", "windows", "tokens")
            },
        }


def _trained_on(result: Result) -> list[str] | None:
    """The texts that a row's weights saw in training; None where nothing was trained."""
    steps = [step for step in result.report.recipe["step"] if "train" in step]
    if not steps:
        return None
    sources = result.report.recipe["calibration"]["source"]
    return sorted({text for step in steps for text in step["text"] or sources})


def bench_content(command: str, rows: list[Row]) -> dict[str, Any]:
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"command": command, "machine": machine, "versions": versions(), "rows": rows}


def rows_so_far(file: Path, command: str) -> list[Row]:
    """The rows of a bench that was stopped.  Raises RecipeError if `file` holds those of another one."""
    if not file.exists():
        return []
    plain = json.loads(file.read_text(encoding="utf-8"))
    if plain["command"] != command:
        raise RecipeError(
            f"{file} holds the rows of another bench ({plain['command']}); choose another file, or remove it"
        )
    return list(plain["rows"])


def _is_row_of(row: Row, entry: Entry, size: float | None) -> bool:
    of_size = entry.sizes is None or row.get(entry.sizes) == size
    return bool(row["method"] == entry.method and of_size and row["options"] == entry.described())


def markdown(rows: Sequence[Row], command: str) -> str:
    """One table a text: a line per way to compress, a column per size, perplexity and KL; then those of a single size,
    with what they take."""
    lines = [f"Regenerate with `{command}`.", ""]
    for text in dict.fromkeys(row["text"] for row in rows):
        of_text = [row for row in rows if row["text"] == text]
        protocol = of_text[0]["protocol"]
        lines += [
            f"## {text}",
            "",
            f"Dense perplexity {of_text[0]['dense_perplexity']:.3f}; {protocol['windows']} windows of "
            f"{protocol['length']}, stride {protocol['stride']}, first token {protocol['first_token'] or 'none'}, "
            f"{protocol['dtype']}, sha256 {protocol['sha256'][:12]}. KL to dense in nats per token.",
            "",
        ]
        sized = [row for row in of_text if "keep" in row]
        lines += _by_size(sized) if sized else []
        single = [row for row in of_text if "keep" not in row]
        lines += _one_by_one(single) if single else []
    return "\n".join(lines)


def _by_size(rows: Sequence[Row]) -> list[str]:
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    lines = ["| way |" + "".join(f" keep {keep} |" for keep in keeps), "|---|" + "--:|" * len(keeps)]
    for way in dict.fromkeys(_way(row) for row in rows):
        cells = []
        for keep in keeps:
            found = [row for row in rows if _way(row) == way and row["keep"] == keep]
            cells.append(f" {found[0]['perplexity']:.2f} ({found[0]['kl']:.3f}) |" if found else " |")
        lines.append(f"| {way} |" + "".join(cells))
    return [*lines, ""]


def _one_by_one(rows: Sequence[Row]) -> list[str]:
    lines = ["| way | bits per weight | folder | perplexity | KL | seconds |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        lines.append(
            f"| {_way(row)} | {row['bits_per_weight']:.3f} | {format_value(row['bytes'], 'bytes')} | "
            f"{row['perplexity']:.2f} | {row['kl']:.4f} | {row['seconds']:.1f} |"
        )
    return [*lines, ""]


def _way(row: Row) -> str:
    """A row's method and what distinguishes it from others of that method."""
    options = dict(row["options"])
    before = [_name_of(step) for step in options.pop("after", [])]
    said = [str(options.pop(key)) for key in ("allocate", "propagate") if key in options]
    said += [f"{key} {value}" for key, value in options.items()]
    return " → ".join([*before, row["method"]]) + (f" ({', '.join(said)})" if said else "")


def _name_of(step: dict[str, Any]) -> str:
    return str(next(step[verb] for verb in STEPS if verb in step))
