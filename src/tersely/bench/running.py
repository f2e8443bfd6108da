"""Row by row: compress to a folder, open the folder, evaluate it beside the dense model, write down what came out.

Rows are written as they come, and a bench that was stopped goes on with the first row that is missing; the statistics
of the dense model, gathered once for all rows, wait beside the rows until the last one is there.  A way that cannot be
gone with this model or at this size is no reason to stop: its row says *refused* (nothing was begun: the family, the
budget) or *failed* (numbers that are not finite), and why.

Memory is that of compressing, evaluation aside: `peak_bytes` is the most that the process held at any moment of it, and
`resident_bytes` what it held before, in which Python, its libraries and the dense model that rows are compared with are
included.  Their difference is what the way itself takes.  The first row that needs a statistic pays for its replay, in
seconds and in memory; `stages` tell what takes how long.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersely.anatomy import needs_first_token
from tersely.bench.beside import Losses, beside_peers
from tersely.bench.entry import Entry, Setting, trains
from tersely.bench.peers import Dequantized, Peer, dequantized
from tersely.checkpoint import locate, read_config, read_tokenizer
from tersely.destination import check_file, check_folder
from tersely.errors import AnatomyError, NumericalError, RecipeError, TerselyError
from tersely.evaluation import Peak, Recalled, Windows, cut, folder_bytes, measure_windows, peak_within
from tersely.job import Progress
from tersely.journal import LOCK, commit_tensors, commit_text, locked, read_tensors
from tersely.pipeline import Result, load, run, versions
from tersely.prepare import examine, prepare
from tersely.recipe import Calibration
from tersely.text import read_text
from tersely.windows import read_windows

Row = dict[str, Any]

NO_RESULT = ("refused", "failed")
"""Keys of a row, with the reason, in the place of figures."""


@dataclass(frozen=True)
class Bench:
    model: str
    entries: Sequence[Entry | Peer]
    keeps: Sequence[float]
    texts: Sequence[str]
    calibration: Calibration
    length: int | None = None
    windows: int | None = None
    seed: int = 0
    device: str = "cpu"
    chosen: Mapping[int, str] = field(default_factory=dict)
    """Width of a code → the way that stands beside every package at that width."""

    def __post_init__(self) -> None:
        for keep in self.keeps:
            if not 0 < keep <= 1:
                raise RecipeError(f"keep {keep}; wanted above 0 and at most 1, the fraction of bytes that is kept")

    @property
    def setting(self) -> Setting:
        return Setting(self.model, self.calibration, self.seed, self.device)


def run_bench(
    bench: Bench, file: Path, command: str, progress: Progress, keep_folders: Path | None = None
) -> list[Row]:
    """All rows, written to `file` (JSON) one by one.  `keep_folders`: where compressed models and statistics stay; else
    they lie beside `file`, in a folder that is removed when all rows are there.

    Raises RecipeError if `file` holds another bench, or if one is at work on it.
    """
    rows_so_far(file, command)
    work = keep_folders or file.with_suffix(".work")
    occupied = RecipeError(f"{file}: a bench is at work on it; let that one end, stop it, or choose another --json")
    with locked(work / LOCK, occupied):
        rows = _run(bench, file, command, progress, work, keep=keep_folders is not None)
        (work / LOCK).unlink()
    if keep_folders is None:
        shutil.rmtree(work, ignore_errors=True)
    return rows


def _run(bench: Bench, file: Path, command: str, progress: Progress, work: Path, *, keep: bool) -> list[Row]:
    rows = rows_so_far(file, command)
    peers = [entry for entry in bench.entries if isinstance(entry, Peer)]
    if peers:
        (work / "losses").mkdir(parents=True, exist_ok=True)
    yardstick = _Yardstick(bench)
    jobs = list(_jobs(bench))
    progress("rows", 0, len(jobs))
    for number, (entry, size) in enumerate(jobs):
        if not any(_is_row_of(row, entry, size) for row in rows):
            out = work / entry.folder(size)
            if out.exists():  # begun, but stopped; done anew, since seconds of a half are seconds of nothing
                shutil.rmtree(out)
            made = (
                dequantized(entry, bench.setting, out)
                if isinstance(entry, Peer)
                else compressed(entry, bench.setting, size, out, work / "statistics")
            )
            row = named(entry, size)
            if isinstance(made, dict):
                rows.append(row | made)
            else:
                measured, losses = yardstick.rows(row, made, progress)
                if peers and losses:
                    commit_tensors(_losses_of(work, row), losses)
                rows += measured
            _write(file, command, rows)
            if not keep:
                shutil.rmtree(out, ignore_errors=True)  # nothing is there of what was refused
        progress("rows", number + 1, len(jobs))
    if peers and any((work / "losses").iterdir()):
        _write(file, command, rows, beside_peers(peers, rows, bench.chosen, lambda row: _read_losses(work, row)))
    return rows


def check_bench(bench: Bench, file: Path, command: str) -> None:
    """Raises TerselyError for whatever would stop a bench or leave it without any row; reads headers and texts, writes
    nothing."""
    check_file(file, "--json")
    check_file(file.with_suffix(".md"))
    check_folder(file.with_suffix(".work"))
    rows_so_far(file, command)
    folder = locate(bench.model, weights=False)
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    _windows(bench, tokenizer, config)
    first = tokenizer.bos_token_id if needs_first_token(config) else None
    read_windows(bench.calibration, tokenizer, config, bench.seed, first)
    refused: list[TerselyError] = []
    jobs = list(_jobs(bench))
    for entry, size in jobs:
        if isinstance(entry, Peer):  # what it refuses only its script can say
            continue
        try:
            examine(entry.recipe(bench.setting, size), None)
        except (RecipeError, AnatomyError) as error:
            refused.append(error)
    if jobs and len(refused) == len(jobs):
        raise refused[0]


@dataclass(frozen=True)
class Compressed:
    """A folder, and what it took to make it."""

    result: Result
    peak: Peak


def compressed(entry: Entry, setting: Setting, size: float | None, out: Path, statistics: Path) -> Compressed | Row:
    """Go one way into the folder `out`, with the statistics of dense models kept in `statistics`.

    A row without figures if that is refused, or fails for numbers that are not finite.
    """
    try:
        prepared = prepare(entry.recipe(setting, size), out)
        with peak_within(torch.device(setting.device)) as peak:
            result = run(prepared, statistics=statistics)
    except (RecipeError, AnatomyError) as error:
        return named(entry, size) | {"refused": str(error)}
    except NumericalError as error:
        return named(entry, size) | {"failed": str(error)}
    return Compressed(result, peak)


def named(entry: Entry | Peer, size: float | None) -> Row:
    """What says which row it is."""
    sized = {} if entry.sizes is None else {entry.sizes: size}
    return {"method": entry.method, "options": entry.described(), "group": entry.compared_with, **sized}


def costs(made: Compressed) -> Row:
    """What a way takes and leaves behind, whatever the text.  `kept` and `removed` are measured, on the bytes of the
    touched weights: the two conventions in which sizes are published."""
    report = made.result.report
    sizes = {row.name: row for row in report.rows}
    touched = sizes["touched weights"]
    kept = touched.ratio
    errors = [site.measured_error for site in report.sites if site.measured_error is not None]
    return {
        "touched_bytes": touched.value,
        "kept": kept,
        "removed": None if kept is None else 1 - kept,
        "bits_per_weight": sizes["bits per touched weight"].value,
        "mean_error": sum(errors) / len(errors) if errors else None,
        "left_dense": sum(site.amount is None for site in report.sites),
        "degraded": len(report.degraded),
        "seconds": report.seconds["everything"],
        "stages": report.seconds,
        "peak_bytes": made.peak.highest,
        "resident_bytes": made.peak.before,
        "trained_on": _trained_on(made.result),
    }


def _jobs(bench: Bench) -> Iterator[tuple[Entry | Peer, float | None]]:
    """Every entry at every one of its sizes; those of one size stand together."""
    for number, keep in enumerate(bench.keeps):
        for entry in bench.entries:
            if entry.sizes is not None:
                yield entry, keep
            elif number == 0:
                yield entry, None


def _windows(bench: Bench, tokenizer: Any, config: Any) -> list[Windows]:
    """Every text of a bench, cut."""
    first = needs_first_token(config)
    return [
        cut(
            read_text(text, "evaluation"),
            tokenizer,
            config,
            length=bench.length,
            first_token=first,
            limit=bench.windows,
        )
        for text in bench.texts
    ]


class _Yardstick:
    """The dense model and the texts, each cut once; what its body says of them is computed once and held, a hidden
    state for every token."""

    def __init__(self, bench: Bench) -> None:
        self.dense = load(bench.model, device=bench.device)
        self._windows = _windows(bench, read_tokenizer(locate(bench.model)), self.dense.config)
        self._recalled: list[Recalled] = [{} for _ in self._windows]

    def rows(self, row: Row, made: Compressed | Dequantized, progress: Progress) -> tuple[list[Row], dict[str, Tensor]]:
        """One for each text, and its windows' losses; a single one that says why if a number is not finite."""
        if isinstance(made, Dequantized):
            out, taken = made.out, made.costs
            model = load(out, dtype=self.dense.dtype, device=str(self.dense.device))  # the folder is in float32
        else:
            out = made.result.out
            taken = {"bytes": folder_bytes(out), **costs(made)}
            model = load(out, device=str(self.dense.device))
        rows: list[Row] = []
        losses: dict[str, Tensor] = {}
        for windows, recalled in zip(self._windows, self._recalled, strict=True):
            try:
                agreement, losses[windows.text.source] = measure_windows(model, self.dense, windows, progress, recalled)
            except NumericalError as error:
                return [row | {"failed": str(error)}], {}
            protocol = asdict(windows.protocol(model))
            rows.append(
                {
                    **row,
                    "text": protocol.pop("text"),
                    **asdict(agreement),
                    "relative_perplexity": agreement.perplexity / agreement.dense_perplexity,
                    **taken,
                    "protocol": protocol,
                }
            )
        return rows, losses


def _trained_on(result: Result) -> list[str] | None:
    """The texts that a row's weights saw in training; None where nothing was trained."""
    recipe = result.report.recipe
    training = [step if "train" in step else step["refine"] for step in recipe["step"] if trains(step)]
    texts = {text for one in training for text in one["text"] or recipe["calibration"]["source"]}
    return sorted(texts) or None


def _write(file: Path, command: str, rows: list[Row], beside: list[dict[str, Any]] | None = None) -> None:
    content = bench_content(command, rows) | ({} if beside is None else {"beside_peers": beside})
    commit_text(file, json.dumps(content, indent=1) + "\n")


def _losses_of(work: Path, row: Row) -> Path:
    """Where the losses of a row's windows lie as long as rows are missing."""
    said = json.dumps([row["method"], row["options"], row.get("keep"), row.get("bits")], sort_keys=True)
    return work / "losses" / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"


def _read_losses(work: Path, row: Row) -> Losses | None:
    file = _losses_of(work, row)
    return read_tensors(file) if file.is_file() else None


def bench_content(command: str, rows: list[Row]) -> dict[str, Any]:
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"command": command, "machine": machine, "versions": versions(), "rows": rows}


def rows_so_far(file: Path, command: str) -> list[Row]:
    """The rows of a bench that was stopped.  Raises RecipeError if `file` holds those of another one."""
    if not file.exists():
        return []
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        theirs, rows = plain["command"], list(plain["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file} holds no rows of a bench; choose another file, or remove it") from error
    if theirs != command:
        raise RecipeError(f"{file} holds the rows of another bench ({theirs}); choose another file, or remove it")
    return rows


def _is_row_of(row: Row, entry: Entry | Peer, size: float | None) -> bool:
    of_size = entry.sizes is None or row.get(entry.sizes) == size
    return bool(row["method"] == entry.method and of_size and row["options"] == entry.described())
