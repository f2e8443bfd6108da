"""Commands that ship: generate, report, export, push."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersely.cli.application import SHIP, app, console, use_threads, working
from tersely.cli.flags import Device, Dtype, Model, Revision, Seed, Threads, Trust
from tersely.errors import RecipeError

if TYPE_CHECKING:
    from tersely.push import Parcel


@app.command(rich_help_panel=SHIP)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    tokens: Annotated[
        int | None, typer.Option(help="How many tokens to add; default: 64, fewer where the context ends.")
    ] = None,
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
    to: Annotated[str, typer.Option("--to", help="compressed-tensors, dense, or peft.")],
    trust_remote_code: Trust = False,
) -> None:
    """A folder as other software reads it, or a refusal that says which module has no counterpart."""
    from tersely.export import export as run

    run(out, destination, to, trust_remote_code=trust_remote_code)
    console.print(f"written: {destination}")


@app.command(rich_help_panel=SHIP)
def push(
    out: Annotated[Path, typer.Argument(help="A folder that tersely wrote.")],
    repo: Annotated[str, typer.Argument(help="The repository, made if it does not exist.", metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is a private one.")] = False,
    branch: Annotated[str | None, typer.Option(help="Another branch than main, made if it does not exist.")] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    with_paths: Annotated[
        bool, typer.Option("--with-paths", help="Publish the names of folders of this machine that the files hold.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, send nothing.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """A verified folder to the hub, with the login of huggingface_hub; --dry-run shows what would go."""
    for flag, text in (("--branch", branch), ("--message", message)):
        if text is not None and not text.strip():
            raise RecipeError(f"{flag} is empty; give a name, or leave it away for the usual one")
    if sys.stderr.isatty():  # the rest of tersely says itself how far it is
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"
    from tersely.push import address, pack, send

    parcel = pack(
        out,
        repo,
        lambda check: _tell(f"ok     {check.name}: {check.detail}"),
        trust_remote_code=trust_remote_code,
    )
    _tell_of(parcel, branch, private=private)
    if dry_run:
        _tell("nothing was sent")
        return
    if parcel.absolute and not with_paths:
        raise RecipeError(
            f"the files name {len(parcel.absolute)} places of this machine, such as {next(iter(parcel.absolute))}; "
            "give --with-paths to publish that, or compress again from a hub name or by relative paths"
        )
    address(parcel, private=private, branch=branch)
    with working():
        commit = send(parcel, message=message or f"{out.resolve().name}, compressed with tersely", branch=branch)
    _tell(f"published: {parcel.url} ({commit})")


def _tell_of(parcel: "Parcel", branch: str | None, *, private: bool) -> None:
    """Everything that would go, and what it would say of this machine."""
    seen_by = "private" if private else "public unless it exists and is private, or its owner's are"
    _tell(f"to {parcel.url}, branch {branch or 'main'}, {seen_by}; files of the same names there are replaced")
    for name, size in parcel.files:
        _tell(f"{size:>17,} B  {name}")
    _tell(f"{parcel.nbytes:>17,} B  in {len(parcel.files)} files")
    _tell(f"dense model: {parcel.base}")
    for name, why in parcel.left_out:
        _tell(f"stays here: {name} ({why})")
    for what, found in (("a place of this machine", parcel.absolute), ("a path", parcel.relative)):
        for path, files in found.items():
            _tell(f"names {what}: {path} (in {', '.join(files)})")


def _tell(line: str) -> None:
    console.print(line, markup=False)
