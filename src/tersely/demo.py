"""The main job on the bundled model: calibrate, three methods at two sizes, a table, a report."""

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path

from rich.table import Table

from tersely.bench import Bench, Entry, Row, bench_content, markdown, rows_so_far, run_bench
from tersely.destination import check_folder
from tersely.errors import CheckpointError
from tersely.job import Progress
from tersely.journal import commit_text
from tersely.recipe import Calibration
from tersely.report.comparison import comparison_page
from tersely.report.rows import format_value

KEEPS = (0.8, 0.6)
ENTRIES = (
    Entry("svd", "uniform", "none"),
    Entry("asvd", "uniform", "none"),
    Entry("svd_llm", "uniform", "block"),
    Entry("svd_llm", "greedy", "block"),
)
WINDOWS = 128
MARK, COMMAND = "demo.json", "tersely demo"


def check_place(out: Path) -> None:
    """Raises TerselyError for a folder that is neither new, nor empty, nor a demo, or that cannot be written."""
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise CheckpointError(f"{out} exists and is no demo; choose another folder or remove it")
        rows_so_far(out / MARK, COMMAND)


def _clear(out: Path) -> None:
    """Remove what a demo makes, and nothing else."""
    for name in (MARK, "table.md", "report.html"):
        (out / name).unlink(missing_ok=True)
    for folder in [*(entry.folder(keep) for entry in ENTRIES for keep in KEEPS), "statistics"]:
        shutil.rmtree(out / folder, ignore_errors=True)


def run_demo(out: Path, progress: Progress) -> tuple[Table, Path]:
    """Compress the bundled model in every way of `ENTRIES`, evaluate, and write folders, JSON and a page into `out`.

    Calibration and evaluation text are disjoint modules of this Python's standard library.  A demo
    that was stopped goes on, one that is complete is made anew.
    """
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    if page.exists():
        _clear(out)
    if not (out / MARK).exists():
        commit_text(out / MARK, json.dumps(bench_content(COMMAND, [])))
    with as_file(files("tersely").joinpath("assets/demo")) as model:
        bench = Bench(
            model=str(model),
            entries=ENTRIES,
            keeps=KEEPS,
            texts=["stdlib"],
            calibration=Calibration(["stdlib"]),
            windows=WINDOWS,
        )
        rows = run_bench(bench, out / MARK, COMMAND, progress, keep_folders=out)
    shutil.rmtree(out / "statistics", ignore_errors=True)
    commit_text(out / "table.md", markdown(rows, COMMAND))
    commit_text(page, comparison_page("The bundled model, compressed", rows))
    return demo_table(rows), page


def demo_table(rows: list[Row]) -> Table:
    first = rows[0]
    protocol = first["protocol"]
    said = f"{protocol['windows']} windows of {protocol['length']} tokens of the standard library"
    title = f"dense perplexity {first['dense_perplexity']:.3f} on {said}"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    table.add_column("allocation")
    for name in ("keep", "folder", "perplexity", "× dense", "KL", "top-1"):
        table.add_column(name, justify="right")
    table.caption = "KL to the dense model in nats per token; top-1: share of tokens with the same likeliest next one"
    table.caption_justify = "left"
    for row in rows:
        table.add_row(
            row["method"],
            row["options"]["allocate"],
            f"{row['keep']}",
            format_value(row["bytes"], "bytes"),
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / row['dense_perplexity']:.2f}",
            f"{row['kl']:.3f}",
            f"{row['top1']:.3f}",
        )
    return table
