"""Commands that look: list, plan, diagnose."""

import json
import sys
from typing import Annotated

import typer

from tersely.cli.application import LOOK, app, console, use_threads
from tersely.cli.asking import Asked
from tersely.cli.flags import (
    Base,
    Bits,
    Calibrate,
    Device,
    Dtype,
    Evaluate,
    Json,
    Keep,
    Length,
    Method,
    Model,
    Order,
    OwnText,
    Perplexity,
    RecipeFile,
    Revision,
    Samples,
    Seed,
    Settings,
    Size,
    Target,
    Text,
    Threads,
    Trust,
)
from tersely.destination import check_file
from tersely.errors import RecipeError, unknown


@app.command("list", rich_help_panel=LOOK)
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a page of documentation.")] = False,
) -> None:
    """Every method, rewrite, cache, conversion, relaxation, allocator, diagnosis and kind: name, paper, options."""
    from tersely.catalogue import catalogue, catalogue_text, methods_page

    if as_json and as_markdown:
        raise RecipeError("--json and --markdown: give one of them")
    text = json.dumps(catalogue(), indent=1) if as_json else methods_page() if as_markdown else catalogue_text()
    sys.stdout.write(text.rstrip("\n") + "\n")


@app.command(rich_help_panel=LOOK)
def plan(
    model: Model,
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
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """From headers only: sizes, which weights would be touched, memory, disk, time.  Runs nothing."""
    from tersely.estimate import estimate, estimate_table

    use_threads(threads)
    from tersely.tables import verb_for

    budget = {"keep": keep, "bits": bits, "size": size, "perplexity": perplexity}
    if recipe is None:
        method = method or "svd_llm"
        fixed = any(setting.startswith("width") for setting in settings or [])
        free = all(given is None for given in budget.values()) and not fixed
        if free and verb_for(method) in ("method", "cache"):
            budget["keep"] = 0.8
    step = {"method": method, **budget, "base": base, "target": target}
    calibration = {"source": calibrate, "samples": samples, "length": length, "order": order, "own_text": own_text}
    top = {"seed": seed, "device": device, "dtype": dtype, "revision": revision}
    asked = Asked(model, step, settings, calibration, evaluate, top, trust_remote_code, recipe)
    console.print(estimate_table(estimate(asked.recipe())))


@app.command(rich_help_panel=LOOK)
def diagnose(
    model: Model,
    what: Annotated[
        list[str] | None, typer.Option(help="Which diagnoses; default: all that the model allows.", metavar="NAME…")
    ] = None,
    text: Text = None,
    samples: Samples = None,
    length: Length = None,
    json_file: Json = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    revision: Revision = None,
) -> None:
    """Spectra, outliers, sensitivity, redundancy, attention dynamics: what a model is like, before anything is done."""
    from tersely.diagnose import DIAGNOSES, tables
    from tersely.diagnose import diagnose as run
    from tersely.journal import commit_text
    from tersely.report.console import plain_table

    use_threads(threads)
    for name in what or ():
        if name not in DIAGNOSES:
            raise RecipeError(unknown("diagnosis", name, DIAGNOSES))
    if json_file is not None:
        check_file(json_file, "--json")
    found = run(
        model,
        what,
        text or ["stdlib"],
        samples=32 if samples is None else samples,
        length=length,
        seed=seed or 0,
        device=device or "cpu",
        revision=revision,
    )
    if json_file is not None:
        commit_text(json_file, json.dumps(found, indent=1) + "\n")
    for name, rows in found.items():
        for table in tables(rows):
            console.print(plain_table(name, table.headings, table.lines))
