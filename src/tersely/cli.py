"""The command line.  Nothing heavy is imported before a command runs, so that ``--help`` answers at once."""

import json
import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tersely.errors import NumericalError, RecipeError, TerselyError

if TYPE_CHECKING:
    from tersely.recipe import Recipe

LOOK, MAKE, PROVE, SHIP = "look", "make", "prove", "ship"

# Options that take several values, and how many positional arguments their commands have.
SEVERAL = {"--text", "--calibrate", "--evaluate", "--set", "--target"}
POSITIONALS = {"bench": 2, "compress": 2, "eval": 1, "plan": 1}

ALONE = {"--debug", "--dry-run", "--fresh", "--speed", "--trust-remote-code"}
"""Options that take no value."""

app = typer.Typer(
    help="Makes language models smaller and proves that they still work.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=True, highlight=False)
debugging = False


class Interrupted(TerselyError):
    """Work had begun when it failed; what is done so far is kept."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: 0 done, 2 wrong input with nothing written, 1 failed midway.  No traceback without --debug."""
    given = spread(list(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.exit(typer.main.get_command(app).main(given, "tersely", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; give the same command again to go on", 1)
    except (Interrupted, NumericalError) as error:
        _fail(str(error), 1)
    except TerselyError as error:
        _fail(str(error), 2)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong flag or value, in typer's own words
            error.show()
            sys.exit(error.exit_code)
        _fail(f"{type(error).__name__}: {error} (unexpected; run `tersely --debug …` for the traceback)", 1)


def spread(arguments: list[str]) -> list[str]:
    """``--text a b`` as ``--text a --text b``, once the command has its positional arguments."""
    result: list[str] = []
    option, positionals, command = None, 0, None
    for i, argument in enumerate(arguments):
        before = arguments[i - 1] if i else ""
        if argument.startswith("-") and argument != "-":
            several = SEVERAL | {"--keep"} if command == "bench" else SEVERAL
            option = argument if argument in several else None
        elif command is None and argument in POSITIONALS:
            command = argument
        elif option is not None and before != option and positionals >= POSITIONALS.get(command or "", 99):
            result.append(option)
        elif option is None and (not before.startswith("--") or "=" in before or before in ALONE):
            positionals += 1
        elif option is not None and before != option:
            option, positionals = None, positionals + 1
        result.append(argument)
    return result


@app.callback()
def settings(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    global debugging
    debugging = debug
    # what the libraries say of opening folders would drown what is said here
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


Model = Annotated[str, typer.Argument(help="A model folder or a hub name.", show_default=False)]
Method = Annotated[str | None, typer.Option(help="Name of a method, as `tersely list` shows them.")]
Keep = Annotated[float | None, typer.Option(help="Bytes of the touched weights, as a fraction of before.")]
Bits = Annotated[float | None, typer.Option(help="Bits per touched weight, metadata included.")]
Size = Annotated[str | None, typer.Option(help="Bytes of the whole output folder, such as 300MB.")]
Calibrate = Annotated[
    list[str] | None, typer.Option(help="Calibration texts: files, .jsonl, datasets names, or stdlib.", metavar="TEXT…")
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows.")]
Length = Annotated[int | None, typer.Option(help="Tokens in a window.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="An option of the method or the step.", metavar="KEY=VALUE…")
]
Target = Annotated[list[str] | None, typer.Option(help="Roles or module-name patterns.", metavar="TARGET…")]
Device = Annotated[str | None, typer.Option(help="Where blocks are computed: cpu, cuda, …")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the checkpoint's own.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the processor.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Accept checkpoints that bring their own code.")]
RecipeFile = Annotated[Path | None, typer.Option(help="A TOML recipe of several steps.")]
Order = Annotated[str | None, typer.Option(help="Calibration windows: random, or the first of the text.")]


@app.command("list", rich_help_panel=LOOK)
def list_(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Every method, allocator and kind: name, paper, what it needs, options."""
    from tersely.catalogue import catalogue, catalogue_text

    sys.stdout.write((json.dumps(catalogue(), indent=1) if as_json else catalogue_text()) + "\n")


@app.command(rich_help_panel=LOOK)
def plan(
    model: Model,
    method: Method = "svd_llm",
    keep: Keep = None,
    bits: Bits = None,
    size: Size = None,
    target: Target = None,
    calibrate: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    settings: Settings = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """From headers only: sizes, which weights would be touched, memory, disk, time.  Runs nothing."""
    from tersely.estimate import estimate, estimate_table

    _threads(threads)
    if keep is None and bits is None and size is None:
        keep = 0.8
    recipe = _recipe(
        model, None, method, keep, bits, size, target, calibrate, samples, length, None, None, settings, None, device,
        dtype, revision, trust_remote_code,
    )  # fmt: skip
    console.print(estimate_table(estimate(recipe)))


@app.command(rich_help_panel=MAKE)
def demo(
    out: Annotated[Path, typer.Argument(help="Where results go.")] = Path("demo-out"),
    threads: Threads = None,
) -> None:
    """The whole flow on the bundled model: calibrate, three methods at two sizes, table, report."""
    from tersely.demo import check_place, run_demo
    from tersely.progress import Reporter

    _threads(threads)
    check_place(out)
    with _working(), Reporter() as progress:
        table, page = run_demo(out, progress)
    console.print(table)
    console.print(f"report: {page}")


@app.command(rich_help_panel=MAKE)
def compress(
    model: Annotated[str | None, typer.Argument(help="A model folder or a hub name.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Argument(help="The folder to make.", show_default=False)] = None,
    recipe: RecipeFile = None,
    method: Method = None,
    keep: Keep = None,
    bits: Bits = None,
    size: Size = None,
    target: Target = None,
    calibrate: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    order: Order = None,
    seed: Seed = None,
    settings: Settings = None,
    evaluate: Annotated[
        list[str] | None, typer.Option(help="Measure the result on these texts.", metavar="TEXT…")
    ] = None,
    statistics: Annotated[Path | None, typer.Option(help="Keep statistics here, for later runs to reuse.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an unfinished run in OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
) -> None:
    """Compress MODEL into OUT with one method, or with the steps of a recipe."""
    _threads(threads)
    if model is None or out is None:
        raise RecipeError("give MODEL and OUT: tersely compress MODEL OUT --method …")
    asked = _recipe(
        model, recipe, method, keep, bits, size, target, calibrate, samples, length, order, seed, settings, evaluate,
        device, dtype, revision, trust_remote_code,
    )  # fmt: skip
    from tersely.pipeline import run
    from tersely.prepare import prepare
    from tersely.progress import Reporter
    from tersely.report.console import outcome_table

    if dry_run:
        from tersely.estimate import estimate, estimate_table

        console.print(estimate_table(estimate(asked)))
    was_there = out.exists()
    ready = prepare(asked, out, fresh=fresh and not dry_run)
    for warning in ready.warnings:
        _say(f"warning: {warning}")
    if dry_run:
        if not was_there:
            shutil.rmtree(out, ignore_errors=True)  # a checkpoint with foreign names was renamed there
        return
    with _working(), Reporter() as progress:
        result = run(ready, statistics=statistics, progress=progress)
    console.print(outcome_table(result.report))
    console.print(f"written: {result.out}")


@app.command("eval", rich_help_panel=PROVE)
def eval_(
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="Texts to measure on.", metavar="TEXT…")] = None,
    length: Length = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: their length.")] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows of each text.")] = None,
    against: Annotated[
        str | None, typer.Option(help="The dense model (default: what a folder of ours was made from).")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second, too.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.", metavar="FILE")] = None,
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

    _threads(threads)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise RecipeError(f"--json {json_file}: no such folder; make it first")
    if against is None and (against := recorded_base(model)) is not None:
        _say(f"beside the dense model it was made from: {against}")
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
    family: Annotated[str, typer.Argument(help="Which systems: low-rank.")],
    model: Model,
    file: Annotated[Path, typer.Option("--json", help="Where rows go; one that holds some is gone on with.")],
    text: Annotated[list[str] | None, typer.Option(help="Texts to measure on.", metavar="TEXT…")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Sizes.", metavar="KEEP…")] = None,
    calibrate: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    order: Order = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows of each text.")] = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Systems side by side on one model, as JSON and a table beside it."""
    from tersely.bench import BENCHES, Bench, check_bench, markdown, run_bench
    from tersely.errors import unknown
    from tersely.journal import commit_text
    from tersely.progress import Reporter
    from tersely.recipe import Calibration

    _threads(threads)
    if family not in BENCHES:
        raise RecipeError(unknown("bench", family, BENCHES))
    asked: dict[str, Any] = {"source": calibrate, "samples": samples, "length": length, "order": order}
    calibration = Calibration(**{key: value for key, value in asked.items() if value is not None})
    keeps, texts = keep or [0.9, 0.8, 0.6, 0.4], text or ["stdlib"]
    job = Bench(model, BENCHES[family], keeps, texts, calibration, length, windows, seed or 0, device or "cpu")
    command = shlex.join(["tersely", *spread(sys.argv[1:])])
    check_bench(job, file, command)
    with _working(), Reporter() as progress:
        rows = run_bench(job, file, command, progress)
    commit_text(file.with_suffix(".md"), markdown(rows, command))
    console.print(f"written: {file} and {file.with_suffix('.md')}")


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

    _threads(threads)
    folder = locate(model, revision)
    opened = load(folder, dtype=dtype or "auto", device=device or "cpu", trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    for piece in stream(opened, tokenizer, prompt, tokens, temperature, seed or 0):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _recipe(
    model: str,
    file: Path | None,
    method: str | None,
    keep: float | None,
    bits: float | None,
    size: str | None,
    target: list[str] | None,
    calibrate: list[str] | None,
    samples: int | None,
    length: int | None,
    order: str | None,
    seed: int | None,
    settings: list[str] | None,
    evaluate: list[str] | None,
    device: str | None,
    dtype: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> "Recipe":
    """The recipe of the flags; with a file, its recipe with what the flags say on top."""
    from tersely.recipe import read_toml, recipe_from

    plain: dict[str, Any] = {}
    if file is not None:
        step = {
            "--method": method,
            "--keep": keep,
            "--bits": bits,
            "--size": size,
            "--target": target,
            "--set": settings,
        }
        given = [flag for flag, value in step.items() if value is not None]
        if given:
            raise RecipeError(f"{', '.join(given)} and --recipe: what a step does stands in the recipe")
        plain = read_toml(file)
    elif method is None:
        raise RecipeError("give --method NAME, or --recipe FILE; `tersely list` shows the methods")
    else:
        step, pairs = {"method": method, "keep": keep, "bits": bits, "size": size, "target": target}, _pairs(settings)
        if twice := sorted(step.keys() & pairs.keys()):
            raise RecipeError(f"--set {twice[0]}: there is an option of its own for that, --{twice[0]}")
        plain["step"] = [{key: value for key, value in (step | pairs).items() if value is not None}]
    calibration = {"source": calibrate, "samples": samples, "length": length, "order": order}
    said = {key: value for key, value in calibration.items() if value is not None}
    plain["calibration"] = plain.get("calibration", {}) | said
    if evaluate is not None:
        plain["evaluation"] = plain.get("evaluation", {}) | {"text": evaluate}
    top = {"model": model, "seed": seed, "device": device, "dtype": dtype, "revision": revision}
    plain |= {key: value for key, value in top.items() if value is not None}
    if trust_remote_code:
        plain["trust_remote_code"] = True
    return recipe_from(plain)


def _pairs(settings: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE with values as TOML writes them; a bare word is a string."""
    pairs: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting}: wanted KEY=VALUE, such as alpha=0.5")
        try:
            pairs[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            pairs[key.strip()] = value
    return pairs


def _threads(count: int | None) -> None:
    if count is None:
        return
    if count < 1:
        raise RecipeError(f"--threads {count}; wanted 1 or more")
    import torch

    torch.set_num_threads(count)


@contextmanager
def _working() -> Iterator[None]:
    """Work has begun: what goes wrong from here on leaves a run that can be resumed."""
    try:
        yield
    except KeyboardInterrupt as error:  # the library would end with 130 and no word
        raise Interrupted("interrupted; give the same command again to go on") from error
    except Exception as error:
        what = str(error) if isinstance(error, TerselyError) else f"{type(error).__name__}: {error}"
        raise Interrupted(f"{what}; what is done so far is kept, give the same command again to go on") from error


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _fail(line: str, status: int) -> None:
    if debugging:
        raise
    _say(f"error: {line}")
    raise SystemExit(status)
