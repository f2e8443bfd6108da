"""Methods side by side: the same model, the same calibration, the same budgets, the same texts.

Every row takes the path that ships: compress to a folder, open the folder, evaluate it beside the dense model.
Statistics of the dense model are gathered once and serve all rows.  Rows are written as they come, and a bench that was
stopped goes on with the first row that is missing.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tersely.errors import RecipeError
from tersely.journal import commit_text
from tersely.pipeline import Result, evaluate, load, run, versions
from tersely.prepare import examine, prepare
from tersely.recipe import Calibration, MethodStep, Recipe
from tersely.sweeps import Progress
from tersely.text import read_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One way to compress, at several sizes."""

    method: str
    allocate: str = "uniform"
    propagate: str = "none"
    options: dict[str, Any] = field(default_factory=dict)

    def step(self, keep: float) -> MethodStep:
        return MethodStep(self.method, keep=keep, allocate=self.allocate, propagate=self.propagate, options=self.options)  # type: ignore[arg-type]

    def folder(self, keep: float) -> str:
        return f"{self.method}-{keep}-{self.allocate}-{self.propagate}"

    def described(self) -> dict[str, Any]:
        return {"allocate": self.allocate, "propagate": self.propagate, **self.options}


LOW_RANK = (
    Entry("svd"),
    Entry("asvd"),
    Entry("svd_llm"),
    Entry("svd_llm", propagate="block"),
    Entry("svd_llm", propagate="input"),
    Entry("svd", "greedy"),
    Entry("asvd", "greedy"),
    Entry("svd_llm", "greedy"),
    Entry("svd_llm", "greedy", "block"),
    Entry("svd_llm", "greedy", "input"),
)
"""The low-rank systems of this release, uniform and greedy."""

BENCHES = {"low-rank": LOW_RANK}


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
    jobs = [(entry, keep) for keep in bench.keeps for entry in bench.entries]
    try:
        for number, (entry, keep) in enumerate(jobs):
            if not any(_is_row_of(row, entry, keep) for row in rows):
                out = work / entry.folder(keep)
                if out.exists():  # compressed, but stopped before it was evaluated
                    shutil.rmtree(out)
                result = _compressed(bench, entry, keep, out, work / "statistics")
                figures = evaluate(
                    out,
                    list(bench.texts),
                    against=dense,
                    length=bench.length,
                    windows=bench.windows,
                    device=bench.device,
                    progress=progress,
                )
                rows += _rows(entry, keep, result, figures)
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
    for keep in bench.keeps:
        for entry in bench.entries:
            examine(Recipe(bench.model, [entry.step(keep)], bench.calibration, device=bench.device), None)


def _compressed(bench: Bench, entry: Entry, keep: float, out: Path, statistics: Path) -> Result:
    recipe = Recipe(bench.model, [entry.step(keep)], bench.calibration, seed=bench.seed, device=bench.device)
    return run(prepare(recipe, out), statistics=statistics)


def _rows(entry: Entry, keep: float, result: Result, figures: dict[str, Any]) -> Iterator[Row]:
    sizes = {row.name: row for row in result.report.rows}
    errors = [site.measured_error for site in result.report.sites if site.measured_error is not None]
    for text in figures["texts"]:
        yield {
            "method": entry.method,
            "options": entry.described(),
            "keep": keep,
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
            "trained_on": None,
            "protocol": {
                key: text[key] for key in ("sha256", "length", "stride", "first_token", "dtype", "windows", "tokens")
            },
        }


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


def _is_row_of(row: Row, entry: Entry, keep: float) -> bool:
    return bool(row["method"] == entry.method and row["keep"] == keep and row["options"] == entry.described())


def markdown(rows: Sequence[Row], command: str) -> str:
    """One table a text: a line per method, a column per size, perplexity and KL."""
    lines = [f"Regenerate with `{command}`.", ""]
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    for text in dict.fromkeys(row["text"] for row in rows):
        of_text = [row for row in rows if row["text"] == text]
        protocol = of_text[0]["protocol"]
        lines += [
            f"## {text}",
            "",
            f"Dense perplexity {of_text[0]['dense_perplexity']:.3f}; {protocol['windows']} windows of "
            f"{protocol['length']}, stride {protocol['stride']}, first token {protocol['first_token'] or 'none'}, "
            f"{protocol['dtype']}, sha256 {protocol['sha256'][:12]}. Cells: perplexity (KL to dense, nats per token).",
            "",
            "| method | allocate | propagate |" + "".join(f" keep {keep} |" for keep in keeps),
            "|---|---|---|" + "--:|" * len(keeps),
        ]
        ways = dict.fromkeys(
            (row["method"], row["options"]["allocate"], row["options"]["propagate"]) for row in of_text
        )
        for method, allocate, propagate in ways:
            cells = []
            for keep in keeps:
                found = [
                    row
                    for row in of_text
                    if (row["method"], row["options"]["allocate"], row["options"]["propagate"], row["keep"])
                    == (method, allocate, propagate, keep)
                ]
                cells.append(f" {found[0]['perplexity']:.2f} ({found[0]['kl']:.3f}) |" if found else " |")
            lines.append(f"| {method} | {allocate} | {propagate} |" + "".join(cells))
        lines.append("")
    return "\n".join(lines)
