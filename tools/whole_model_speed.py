r"""Seconds of quantizing a whole model, statistics included: our methods beside the packages of the same algorithm.

    python tools/whole_model_speed.py MODEL --calibrate TEXT --peers bench/peers [--width 4] [--rounds 3] \
        [--threads 1 2] [--out F.md]

`tersely bench quantize` lets all ways share one calibration, so that its seconds cannot be held against a package that
gathers its own.  Here every run starts from nothing: ours and theirs take turns, round after round, and the fastest run
of each counts; of a package that is one of three in a process (`bench/peers/request.py`), since the first loads code.

Of a package that is the time of its own call, on a model that is open and windows that are in memory.  Of ours three
figures: "quantizing" is the same, statistics and codes; "statistics" its forward passes and sums, without the codes;
"all of it" also reads text and checkpoint, writes the folder safely to disk, and reports.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tersely.bench import Entry, Setting
from tersely.bench.peers import Dequantized, Peer, dequantized, peers_in
from tersely.journal import commit_text
from tersely.methods import METHODS
from tersely.pipeline import run
from tersely.prepare import prepare
from tersely.recipe import Calibration

GPTQ = (
    Entry("gptq", propagate="none", sizes=None),
    Entry("gptq", propagate="none", options={"shrink": True}, sizes=None),
    Entry("gptq", propagate="block", sizes=None),
    Entry("gptq", propagate="input", sizes=None),
)
"""On the inputs of the dense model, also with a search for the range of every group; block after block behind what is
quantized already, as llmcompressor does; input after input."""

PAIRS: tuple[tuple[str, dict[str, Any], tuple[Entry, ...]], ...] = (
    ("hqq", {}, (Entry("hqq", propagate="none", sizes=None),)),
    ("sinq", {}, (Entry("sinq", propagate="none", sizes=None),)),
    ("llmcompressor", {"algorithm": "gptq", "batches": "its own"}, GPTQ),
    ("llmcompressor", {"algorithm": "gptq", "batches": "large"}, GPTQ[:1]),
)
"""Package, its settings, and ours by the same algorithm.  llmcompressor is called as its documentation does it, with a
data set of windows, which it takes one by one, and once more with batches that it is handed."""

QUANTIZING = ("replay", "curves", "allocate", "factorise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibrate", nargs="+", required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="a table for each")
    parser.add_argument("--out", type=Path, help="a Markdown file that gets the table, too")
    given = parser.parse_args()
    lines = [f"Regenerate with `{shlex.join(['python', 'tools/whole_model_speed.py', *sys.argv[1:]])}`."]
    for threads in given.threads:
        torch.set_num_threads(threads)
        for line in ("", *table(given)):
            print(line, flush=True)
            lines.append(line)
    if given.out is not None:
        commit_text(given.out, "\n".join(lines) + "\n")


def table(given: argparse.Namespace) -> Iterator[str]:
    calibration = Calibration(source=given.calibrate, samples=given.samples, length=given.length, order="first")
    setting = Setting(given.model, calibration)
    yield (
        f"{given.width} bits in groups of 64; {given.samples} windows of {given.length}; {torch.get_num_threads()} of "
        f"{os.cpu_count()} threads, {given.rounds} rounds, the fastest of each; torch {torch.__version__}"
    )
    yield from (
        "",
        "| package | its seconds | ours | statistics, s | quantizing, s | all of it, s | package / quantizing | "
        "package / all of it |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    )
    for package, settings, entries in PAIRS:
        grid = {"width": given.width, "group": 64}
        peer = replace(next(one for one in peers_in(given.peers) if one.package == package), options=grid | settings)
        theirs, ours = fastest(peer, entries, setting, given)
        for entry, (statistics, inner, whole) in zip(entries, ours, strict=True):
            yield (
                f"| {said(package, settings)} | {theirs:.2f} | {entry.way} | {statistics:.2f} | {inner:.2f} | "
                f"{whole:.2f} | {theirs / inner:.2f} | {theirs / whole:.2f} |"
            )


def said(package: str, settings: dict[str, Any]) -> str:
    words = [f"{key} {value}" for key, value in settings.items() if key != "algorithm"]
    return f"{package} ({', '.join(words)})" if words else package


def fastest(
    peer: Peer, entries: Sequence[Entry], setting: Setting, given: argparse.Namespace
) -> tuple[float, list[list[float]]]:
    """The package's seconds, and ours of every entry: of statistics, of quantizing and of everything."""
    theirs: list[float] = []
    ours: list[list[tuple[float, float, float]]] = [[] for _ in entries]
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            found = dequantized(peer, setting, Path(scratch, "theirs"))
            if not isinstance(found, Dequantized):
                raise SystemExit(f"{peer.package}: {next(iter(found.values()))}")
            theirs.append(found.costs["seconds"])
            for number, entry in enumerate(entries):
                recipe = replace(entry, options={"width": given.width, **entry.options}).recipe(setting, None)
                if not METHODS[entry.method]().needs:  # text would be read only to measure errors
                    recipe = replace(recipe, calibration=Calibration())
                seconds = run(prepare(recipe, Path(scratch, f"ours-{number}"))).report.seconds
                quantizing = sum(seconds.get(stage, 0.0) for stage in QUANTIZING)
                ours[number].append((seconds.get("replay", 0.0), quantizing, seconds["everything"]))
    return min(theirs), [[min(column) for column in zip(*of, strict=True)] for of in ours]


if __name__ == "__main__":
    main()
