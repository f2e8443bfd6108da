"""Commands that prove: eval, verify, bench."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tersely.cli.application import PROVE, app, console, is_to_end, say, spread, use_threads, working
from tersely.cli.flags import (
    Calibrate,
    Device,
    Dtype,
    Json,
    Length,
    Model,
    Order,
    OwnText,
    Revision,
    Samples,
    Seed,
    Text,
    Threads,
    Trust,
)
from tersely.destination import check_file
from tersely.errors import RecipeError


@app.command("eval", rich_help_panel=PROVE)
def eval_(
    model: Model,
    text: Text = None,
    length: Length = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: their length.")] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows of each text.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Perplexity as a paper's code computes it: gptq, gptq-new, wanda, llm-pruner, svd-llm, slicegpt, "
            "basis-sharing, dobi, lm-eval-word."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="The dense model (default: what a folder of ours was made from), or the JSON of its evaluation."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Files of questions, or names of lm-eval.", metavar="FILE-OR-NAME…")
    ] = None,
    questions: Annotated[int | None, typer.Option(help="Only the first so many questions of each task.")] = None,
    drift: Annotated[bool, typer.Option("--drift", help="Drift of the hidden states by depth, too.")] = False,
    prompt: Annotated[list[str] | None, typer.Option(help="Continue this, with both models.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second, too.")] = False,
    json_file: Json = None,
    card: Annotated[
        bool,
        typer.Option("--card", help="Record the figures in the folder, too: its report, its page, its model card."),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity with its protocol, KL and top-1 agreement to the dense model, tasks, tokens per second, memory."""
    from tersely.checkpoint import locate
    from tersely.evaluation import is_task_file
    from tersely.journal import commit_text
    from tersely.origin import dense_model
    from tersely.pipeline import evaluate
    from tersely.progress import Reporter
    from tersely.record import RECORDED, check_recordable, record
    from tersely.report.console import evaluation_table, plain_table

    use_threads(threads)
    if json_file is not None:
        check_file(json_file, "--json")
    if card:
        check_recordable(Path(model))
    # names may be given as one list with commas, as lm-eval takes them
    asked = [one for task in tasks or [] for one in ([task] if is_task_file(task) else task.split(","))]
    if questions is not None and not asked:
        raise RecipeError(f"--questions {questions} without --tasks; name tasks, or leave it out")
    folder = locate(model, revision)
    if against is None:
        dense, line = dense_model(folder)
        against = None if dense is None else str(dense)
        if line:
            say(line)
    with Reporter(is_to_end=is_to_end) as progress:
        figures = evaluate(
            folder,
            text or ([] if speed or asked or prompt else ["stdlib"]),
            against=against,
            length=length,
            stride=stride,
            windows=windows,
            protocol=protocol,
            tasks=asked,
            questions=questions,
            drift=drift,
            prompts=prompt or [],
            speed=speed,
            dtype=dtype or "auto",
            device=device or "cpu",
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_file is not None:
        commit_text(json_file, json.dumps(figures, indent=1) + "\n")
    if card:
        record(Path(model), figures)
    console.print(evaluation_table(figures))
    for table in _details(figures):
        console.print(plain_table(*table))
    if card:
        console.print(f"recorded in {model}: {', '.join(RECORDED)}", markup=False)


def _details(figures: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[Any]]]]:
    """Titles, headings and lines of what does not fit beside a perplexity."""
    texts = [row for row in figures.get("texts", []) if "protocol" in row]
    if texts:
        facts = [[row["text"], row["protocol"], row["corpus"], *_said(row)] for row in texts]
        yield "protocol", ["text", "protocol", "as", "quirks", "departures from the code"], facts
    if tasks := figures.get("tasks"):
        headings = ["task", "metric", "value", "±", "n", "floor"]
        yield "tasks", headings, [[row.get(key) for key in ("task", "metric", "value", "stderr", "n", "floor")]
                                  for row in tasks]  # fmt: skip
    for row in figures.get("texts", []):
        if "drift" in row:
            lines = [[one["block"], one["relative_error"], one["cosine"]] for one in row["drift"]]
            yield f"drift, {row['text']}", ["block", "relative error", "cosine"], lines
    if batches := figures.get("speed", {}).get("batches"):
        headings = ["batch", "prefill tokens/s", "first token, s", "decode tokens/s", "quartiles", "cache B/token",
                    "read B/token"]  # fmt: skip
        lines = []
        for one in batches:
            decode = one["decode_tokens_per_second"]
            spread = f"{decode['lower']:.4g} to {decode['upper']:.4g}"
            medians = [one[key]["median"] for key in ("prefill_tokens_per_second", "first_token_seconds")]
            bound = [one["cache_bytes_per_token"], one["bytes_read_per_token"]]
            lines.append([one["batch"], *medians, decode["median"], spread, *bound])
        yield "speed", headings, lines
    for one in figures.get("samples", []):
        lines = [["model", one["text"]]] + ([["dense", one["dense"]]] if "dense" in one else [])
        yield one["prompt"], ["", "continuation"], lines


def _said(row: dict[str, Any]) -> list[str]:
    return ["; ".join(row["definition"]["quirks"]) or "–", "; ".join(row["departures"]) or "none"]


@app.command(rich_help_panel=PROVE)
def verify(
    out: Annotated[Path, typer.Argument(help="A folder that tersely wrote.")], trust_remote_code: Trust = False
) -> None:
    """Checksums, manifest, finite weights, reopening."""
    from tersely.verify import verify as checks

    passed = True
    for check in checks(out, trust_remote_code=trust_remote_code):
        console.print(f"{'ok' if check.passed else 'FAILED':7}{check.name}: {check.detail}")
        passed &= check.passed
    if not passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=PROVE)
def bench(
    family: Annotated[str, typer.Argument(help="Which systems: low-rank, quantize, shapes, or peers alone.")],
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
    own_text: OwnText = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows of each text.")] = None,
    peers: Annotated[
        Path | None,
        typer.Option(help="Other people's packages, too: the folder of their scripts, bench/peers.", metavar="FOLDER"),
    ] = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Systems side by side on one model, as JSON and a table beside it; one that was stopped goes on."""
    from tersely.bench import (
        BENCHES,
        LEARNED,
        NO_RESULT,
        Bench,
        Entry,
        Peer,
        check_bench,
        markdown,
        peers_in,
        run_bench,
    )
    from tersely.errors import unknown
    from tersely.journal import commit_text
    from tersely.progress import Reporter
    from tersely.recipe import Calibration

    use_threads(threads)
    if family not in BENCHES:
        raise RecipeError(unknown("bench", family, BENCHES))
    asked: dict[str, Any] = {"source": calibrate, "samples": samples, "length": length}
    asked |= {"order": order, "own_text": own_text}
    calibration = Calibration(**{key: value for key, value in asked.items() if value is not None})
    keeps, texts = keep or [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], text or ["stdlib"]
    theirs = () if peers is None else peers_in(peers)
    entries: tuple[Entry | Peer, ...] = (*BENCHES[family], *theirs)
    if not entries:
        raise RecipeError("bench peers: none given; say where their scripts are with --peers bench/peers")
    chosen = {width: entry.way for width, entry in LEARNED.items()}
    job = Bench(model, entries, keeps, texts, calibration, length, windows, seed or 0, device or "cpu", chosen)
    command = shlex.join(["tersely", *spread(sys.argv[1:])])
    check_bench(job, file, command)
    with Reporter(is_to_end=is_to_end) as progress, working(progress.reached):
        rows = run_bench(job, file, command, progress)
    beside = json.loads(file.read_text(encoding="utf-8")).get("beside_peers", ())
    commit_text(file.with_suffix(".md"), markdown(rows, command, beside))
    if empty := sum(any(key in row for key in NO_RESULT) for row in rows):
        say(f"{empty} rows without a result; the table says why")
    console.print(f"written: {file} and {file.with_suffix('.md')}")
