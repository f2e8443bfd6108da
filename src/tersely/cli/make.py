"""Commands that make a folder: demo, compress, train, convert."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tersely.cli.application import MAKE, app, console, is_to_end, say, use_threads, working
from tersely.cli.asking import Asked
from tersely.cli.flags import (
    Base,
    Bits,
    Calibrate,
    Device,
    DryRun,
    Dtype,
    Evaluate,
    Fresh,
    Keep,
    Length,
    MaybeModel,
    Method,
    Order,
    Out,
    OwnText,
    Perplexity,
    RecipeFile,
    Revision,
    Samples,
    Seed,
    Settings,
    Size,
    Statistics,
    Target,
    Threads,
    Trust,
)
from tersely.destination import check_folder
from tersely.errors import RecipeError


@app.command(rich_help_panel=MAKE)
def demo(
    out: Annotated[Path, typer.Argument(help="Where results go.")] = Path("demo-out"),
    threads: Threads = None,
) -> None:
    """The whole flow on the bundled model: calibrate, three methods at two sizes, table, report."""
    from tersely.demo import check_place, run_demo
    from tersely.progress import Reporter

    use_threads(threads)
    check_place(out)
    with Reporter(is_to_end=is_to_end) as progress, working(progress.reached):
        table, page = run_demo(out, progress)
    console.print(table)
    console.print(f"report: {page}")


@app.command(rich_help_panel=MAKE)
def compress(
    model: MaybeModel = None,
    out: Out = None,
    recipe: RecipeFile = None,
    method: Method = None,
    keep: Keep = None,
    bits: Bits = None,
    size: Size = None,
    perplexity: Perplexity = None,
    base: Base = None,
    target: Target = None,
    calibrate: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    order: Order = None,
    own_text: OwnText = None,
    seed: Seed = None,
    settings: Settings = None,
    evaluate: Evaluate = None,
    statistics: Statistics = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Compress MODEL into OUT with one method, or with the steps of a recipe."""
    use_threads(threads)
    budget = {"keep": keep, "bits": bits, "size": size, "perplexity": perplexity}
    step = {"method": method, **budget, "base": base, "target": target}
    calibration = {"source": calibrate, "samples": samples, "length": length, "order": order, "own_text": own_text}
    top = {"seed": seed, "device": device, "dtype": dtype, "revision": revision}
    asked = Asked(_given(model, out), step, settings, calibration, evaluate, top, trust_remote_code, recipe)
    _make(asked, None, out, fresh=fresh, dry_run=dry_run, statistics=statistics)


@app.command(rich_help_panel=MAKE)
def train(
    model: MaybeModel = None,
    out: Out = None,
    recipe: RecipeFile = None,
    method: Annotated[str | None, typer.Option(help="Name of a relaxation, as `tersely list` shows them.")] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help="What is minimised: tokens, logits.", metavar="NAME…")
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Average bits per weight, where widths are learned.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.")] = None,
    rate: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    target: Target = None,
    calibrate: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    order: Order = None,
    own_text: OwnText = None,
    seed: Seed = None,
    settings: Settings = None,
    evaluate: Evaluate = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Train MODEL into OUT with one relaxation, or with the steps of a recipe."""
    use_threads(threads)
    step = {"method": method, "objective": objective, "bits": bits, "tokens": tokens, "rate": rate, "target": target}
    calibration = {"source": calibrate, "samples": samples, "length": length, "order": order, "own_text": own_text}
    top = {"seed": seed, "device": device, "dtype": dtype, "revision": revision}
    asked = Asked(_given(model, out), step, settings, calibration, evaluate, top, trust_remote_code, recipe)
    _make(asked, "train", out, fresh=fresh, dry_run=dry_run)


@app.command(rich_help_panel=MAKE)
def convert(
    model: MaybeModel = None,
    out: Out = None,
    recipe: RecipeFile = None,
    method: Annotated[str | None, typer.Option(help="Name of a conversion, as `tersely list` shows them.")] = None,
    seed: Seed = None,
    settings: Settings = None,
    evaluate: Evaluate = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Convert MODEL into OUT: another position embedding, another attention."""
    use_threads(threads)
    top = {"seed": seed, "device": device, "dtype": dtype, "revision": revision}
    asked = Asked(_given(model, out), {"method": method}, settings, {}, evaluate, top, trust_remote_code, recipe)
    _make(asked, "convert", out, fresh=fresh, dry_run=dry_run)


def _given(model: str | None, out: Path | None) -> str:
    if model is None or out is None:
        raise RecipeError("give MODEL and OUT: tersely compress MODEL OUT --method …")
    return model


def _make(
    asked: Asked, verb: str | None, out: Any, *, fresh: bool, dry_run: bool, statistics: Path | None = None
) -> None:
    """Check the recipe, and unless that was all, run it."""
    recipe = asked.recipe(verb)
    check_folder(out)
    if statistics is not None:
        check_folder(statistics, "--statistics")
    from tersely.journal import clear_unbegun
    from tersely.pipeline import run
    from tersely.prepare import prepare
    from tersely.progress import Reporter
    from tersely.report.console import outcome_table

    if dry_run:
        from tersely.estimate import estimate, estimate_table

        console.print(estimate_table(estimate(recipe)))
    was_there = out.exists()
    ready = prepare(recipe, out, fresh=fresh and not dry_run)
    for warning in ready.warnings:
        say(f"warning: {warning}")
    if dry_run:
        if not was_there:
            clear_unbegun(out)  # a checkpoint with foreign names was renamed there
        return
    with ready.journal.alone(), Reporter(is_to_end=is_to_end) as progress, working(progress.reached):
        result = run(ready, statistics=statistics, progress=progress)
    console.print(outcome_table(result.report))
    console.print(f"written: {result.out}")
