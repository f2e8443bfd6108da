"""Commands that prove: eval, verify, bench."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tersely.cli.application import PROVE, app, console, say, spread, use_threads, working
from tersely.cli.flags import (
    Calibrate,
    Device,
    Dtype,
    Json,
    Length,
    Model,
    Order,
    Revision,
    Samples,
    Seed,
    Text,
    Threads,
    Trust,
)
from tersely.errors import RecipeError


@app.command("eval", rich_help_panel=PROVE)
def eval_(
    model: Model,
    text: Text = None,
    length: Length = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: their length.")] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows of each text.")] = None,
    against: Annotated[
        str | None, typer.Option(help="The dense model (default: what a folder of ours was made from).")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second, too.")] = False,
    json_file: Json = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity with its protocol, KL and top-1 agreement to the dense model, tokens per second, memory."""
    from tersely.checkpoint import locate
    from tersely.journal import commit_text
    from tersely.pipeline import evaluate, recorded_base
    from tersely.progress import Reporter
    from tersely.report.console import evaluation_table

    use_threads(threads)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise RecipeError(f"--json {json_file}: no such folder; make it first")
    if against is None and (against := recorded_base(model)) is not None:
        say(f"beside the dense model it was made from: {against}")
    with Reporter() as progress:
        figures = evaluate(
            model if revision is None else locate(model, revision),
            text or ([] if speed else ["stdlib"]),
            against=against,
            length=length,
            stride=stride,
            windows=windows,
            speed=speed,
            dtype=dtype or "auto",
            device=device or "cpu",
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_file is not None:
        commit_text(json_file, json.dumps(figures, indent=1) + "\n")
    console.print(evaluation_table(figures))


@app.command(rich_help_panel=PROVE)
def verify(out: Annotated[Path, typer.Argument(help="A folder that tersely wrote.")]) -> None:
    """Checksums, manifest, finite weights, reopening."""
    from tersely.verify import verify as checks

    passed = True
    for check in checks(out):
        console.print(f"{'ok' if check.passed else 'FAILED':7}{check.name}: {check.detail}")
        passed &= check.passed
    if not passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=PROVE)
def bench(
    family: Annotated[str, typer.Argument(help="Which systems: low-rank, quantize or shapes.")],
    model: Model,
    file: Annotated[Path, typer.Option("--json", help="Where rows go; one that holds some is gone on with.")],
    text: Text = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Sizes; default: 0.9 0.8 0.7 0.6 0.5 0.4.", metavar="KEEP…")
    ] = None,
    calibrate: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    order: Order = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows of each text.")] = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Systems side by side on one model, as JSON and a table beside it; one that was stopped goes on."""
    from tersely.bench import BENCHES, NO_RESULT, Bench, check_bench, markdown, run_bench
    from tersely.errors import unknown
    from tersely.journal import commit_text
    from tersely.progress import Reporter
    from tersely.recipe import Calibration

    use_threads(threads)
    if family not in BENCHES:
        raise RecipeError(unknown("bench", family, BENCHES))
    asked: dict[str, Any] = {"source": calibrate, "samples": samples, "length": length, "order": order}
    calibration = Calibration(**{key: value for key, value in asked.items() if value is not None})
    keeps, texts = keep or [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], text or ["stdlib"]
    job = Bench(model, BENCHES[family], keeps, texts, calibration, length, windows, seed or 0, device or "cpu")
    command = shlex.join(["tersely", *spread(sys.argv[1:])])
    check_bench(job, file, command)
    with working(), Reporter() as progress:
        rows = run_bench(job, file, command, progress)
    commit_text(file.with_suffix(".md"), markdown(rows, command))
    if empty := sum(any(key in row for key in NO_RESULT) for row in rows):
        say(f"{empty} rows without a result; the table says why")
    console.print(f"written: {file} and {file.with_suffix('.md')}")
