"""Commands that ship: generate, report, export."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tersely.cli.application import SHIP, app, console, use_threads
from tersely.cli.flags import Device, Dtype, Model, Revision, Seed, Threads, Trust


@app.command(rich_help_panel=SHIP)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Continue a text, streaming."""
    from tersely.checkpoint import locate, read_tokenizer
    from tersely.generate import stream
    from tersely.pipeline import load

    use_threads(threads)
    folder = locate(model, revision)
    opened = load(folder, dtype=dtype or "auto", device=device or "cpu", trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    for piece in stream(opened, tokenizer, prompt, tokens, temperature, seed or 0):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command(rich_help_panel=SHIP)
def report(
    given: Annotated[
        list[Path],
        typer.Argument(
            help="Folders that tersely wrote, and JSON of `tersely bench` and `tersely eval`.", metavar="OUT…"
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.", metavar="FILE")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="What stands above a comparison.")] = None,
) -> None:
    """One self-contained HTML file: of a run, or of runs and benches side by side."""
    from tersely.journal import commit_text
    from tersely.report.page import check_place, whole_page
    from tersely.report.reading import read_given

    check_place(out)
    page = whole_page(read_given(given), title)
    commit_text(out, page)
    console.print(f"written: {out} ({len(page.encode()) / 1e6:.1f} MB)")


@app.command(rich_help_panel=SHIP)
def export(
    out: Annotated[Path, typer.Argument(help="A folder that tersely wrote.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[str, typer.Option("--to", help="dense, or peft.")],
) -> None:
    """A folder as other software reads it, or a refusal that says which module has no counterpart."""
    from tersely.export import export as run

    run(out, destination, to)
    console.print(f"written: {destination}")
