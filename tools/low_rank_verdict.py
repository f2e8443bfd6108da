r"""The verdict on a low-rank recipe: against every other way of its group, on full texts, over calibration seeds.

    python tools/low_rank_verdict.py MODEL --best recipes/low_rank_best.toml --calibrate wiki.train.raw \
        --text wiki.test.raw c4.jsonl books.test.txt ptb.test.txt --out docs/results/low_rank_verdict

The first text is judged alone, all texts are, and so is the mean of the others (each counts the same; a mean of losses,
that is the geometric mean of perplexities).  A text that the dense model does not model, since a table of pairs of
tokens that was counted on half of the text predicts the other half better, is shown, marked, and left out of the mean.
Every seed draws other calibration windows; within a seed all ways share them and their statistics.  Per size, text and
seed the recipe is paired, window by window, with whichever other way is the strongest there (see
`tersely.evaluation.paired`): choosing that one after the fact favours the others.  `--against` names other ways as
`tersely bench low-rank` prints them, or recipes; by default all low-rank entries of the recipe's group.  Of several
recipes each is judged at the sizes that its own `keep` is nearest to, and at the others it is no rival.

Writes OUT.json row by row and OUT.md at the end.  A run that was stopped goes on, also with more sizes, seeds or ways,
and what is said at the end is said of all rows: so a way that is far behind for one seed need not be made for others.
Losses of windows and statistics lie in OUT.work, the latter until their seed is complete.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tersely.anatomy import needs_first_token
from tersely.bench import GROUPS, LOW_RANK, NO_RESULT, Entry, Row, Setting, bench_content, compressed, costs, entry_of
from tersely.checkpoint import locate, read_config, read_tokenizer
from tersely.errors import NumericalError, RecipeError, unknown
from tersely.evaluation import Windows, cut, folder_bytes, paired_over, perplexity_of, window_losses
from tersely.journal import commit_tensors, commit_text, read_tensors
from tersely.pipeline import load
from tersely.recipe import Calibration, read_recipe
from tersely.report.rows import format_value
from tersely.text import read_text

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SEEDS = (0, 1, 2)
DISCOUNT = 0.75
"""What is taken from every count of a pair, for pairs that were not seen."""
OTHERS = "mean of the other texts"

Losses = dict[str, Tensor]
"""Text → the mean loss of each of its windows."""


@dataclass(frozen=True)
class Trial:
    """What is compared, and how."""

    model: str
    best: Mapping[float, Entry]
    """What is judged, under the size that it is meant for."""
    others: Sequence[Entry]
    texts: Sequence[str]
    calibration: Calibration
    keeps: Sequence[float] = KEEPS
    seeds: Sequence[int] = SEEDS
    length: int | None = None
    windows: int | None = None
    device: str = "cpu"

    def jobs(self) -> Iterator[tuple[int, float, Entry]]:
        for seed in self.seeds:
            for keep in self.keeps:
                yield from ((seed, keep, entry) for entry in (judged(self.best, keep), *self.others))

    def cuts(self) -> list[Windows]:
        folder = locate(self.model)
        config, tokenizer = read_config(folder), read_tokenizer(folder)
        first = needs_first_token(config)
        return [
            cut(
                read_text(t, "evaluation"), tokenizer, config, length=self.length, first_token=first, limit=self.windows
            )
            for t in self.texts
        ]


def judged(best: Mapping[float, Entry], keep: float) -> Entry:
    """The one whose own size is nearest; of two as near, the one that was named first."""
    return best[min(best, key=lambda own: round(abs(own - keep), 9))]


# --- running ----------------------------------------------------------------------------------------------------------


def run(trial: Trial, out: Path, command: str) -> dict[str, Any]:
    """All rows, and the verdict on them, written to `out`.json and `out`.md.

    Raises RecipeError if `out`.json holds rows of another model, other texts or another calibration.
    """
    file, work, cuts = out.with_suffix(".json"), out.with_suffix(".work"), trial.cuts()
    setting = {
        "model": trial.model,
        "calibration": asdict(trial.calibration),
        "texts": [[one.text.source, one.text.sha256, one.length, len(one)] for one in cuts],
    }
    content = _so_far(file, setting) or bench_content(command, []) | {"setting": setting}
    content.pop("command", None)  # of a bench there is one
    content["commands"] = list(dict.fromkeys([*content.get("commands", ()), command]))
    (work / "losses").mkdir(parents=True, exist_ok=True)
    if "dense" not in content:
        content["dense"] = _dense(trial, cuts)
        commit_text(file, json.dumps(content, indent=1) + "\n")
    # what was said of windows whose losses are gone cannot be paired: those rows are made anew
    content["rows"] = [
        row for row in content["rows"] if "losses" not in row or (work / "losses" / row["losses"]).exists()
    ]
    jobs = list(trial.jobs())
    for number, (seed, keep, entry) in enumerate(jobs, start=1):
        statistics = work / f"statistics-{seed}"
        if _row_of(content["rows"], entry.way, keep, seed) is None:
            content["rows"].append(_row(trial, cuts, entry, keep, seed, work))
            commit_text(file, json.dumps(content, indent=1) + "\n")
            sys.stderr.write(f"{number}/{len(jobs)} seed {seed} keep {keep} {entry.way}\n")
        if number == len(jobs) or jobs[number][0] != seed:
            shutil.rmtree(statistics, ignore_errors=True)
    content["verdict"] = verdict(content, trial.best, lambda row: read_tensors(work / "losses" / row["losses"]))
    commit_text(file, json.dumps(content, indent=1) + "\n")
    commit_text(out.with_suffix(".md"), markdown(content))
    return content


def _so_far(file: Path, setting: dict[str, Any]) -> dict[str, Any] | None:
    if not file.exists():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    theirs = content.get("setting", {})
    if "calibration" in theirs:  # one that was written before there was all that is said of it today
        theirs["calibration"] = asdict(Calibration()) | theirs["calibration"]
    if theirs != setting:
        raise RecipeError(
            f"{file} holds rows of another model, other texts or another calibration; choose another --out"
        )
    return content


def _dense(trial: Trial, cuts: Sequence[Windows]) -> list[dict[str, Any]]:
    model = load(trial.model, device=trial.device)
    losses = _losses(model, cuts)
    vocabulary = model.config.get_text_config().vocab_size
    found = []
    for one in cuts:
        perplexity, pairs = perplexity_of(_mean(losses[one.text.source], one)), of_pairs(one.content, vocabulary)
        said = {"perplexity": perplexity, "pairs": pairs, "modelled": perplexity < pairs}
        found.append(asdict(one.protocol(model)) | said)
    return found


def of_pairs(tokens: Int[Tensor, "..."], vocabulary: int) -> float:
    """The perplexity of the second half of a text under pairs of neighbouring tokens counted on its first half.

    p(b | a) = (max(n_ab - D, 0) + D k_a q(b)) / n_a, where k_a different tokens were seen behind a and q(b) is the
    frequency of b, one added to every count (absolute discounting; Ney, Essen and Kneser, 1994).  Who has never seen
    a text but has learned the language should be far below; who is above has learned less of it than that.
    """
    counted, judged = numpy.array_split(tokens.flatten().numpy().astype(numpy.int64), 2)
    q = numpy.bincount(counted, minlength=vocabulary) + 1.0
    q /= q.sum()
    pairs, n_ab = numpy.unique(counted[:-1] * vocabulary + counted[1:], return_counts=True)
    first = pairs // vocabulary
    n_a, k_a = numpy.bincount(first, n_ab, vocabulary), numpy.bincount(first, minlength=vocabulary)
    a, b = judged[:-1], judged[1:]
    at = numpy.searchsorted(pairs, a * vocabulary + b).clip(max=len(pairs) - 1)
    seen = numpy.where(pairs[at] == a * vocabulary + b, n_ab[at], 0)
    known = n_a[a] > 0
    p = (numpy.maximum(seen - DISCOUNT, 0) + DISCOUNT * k_a[a] * q[b]) / numpy.maximum(n_a[a], 1)
    return float(numpy.exp(-numpy.log(numpy.where(known, p, q[b])).mean()))


def _row(trial: Trial, cuts: Sequence[Windows], entry: Entry, keep: float, seed: int, work: Path) -> Row:
    name = f"{entry.folder(keep)}-{seed}"
    folder = work / name
    if folder.exists():  # begun, but stopped
        shutil.rmtree(folder)
    said: Row = {"way": entry.way, "group": entry.compared_with, "keep": keep, "seed": seed}
    setting = Setting(trial.model, trial.calibration, seed, trial.device)
    made = compressed(entry, setting, keep, folder, work / f"statistics-{seed}")
    try:
        if isinstance(made, dict):  # refused, or failed
            return said | {key: made[key] for key in NO_RESULT if key in made}
        losses = _losses(load(folder, device=trial.device), cuts)
        perplexities = {one.text.source: perplexity_of(_mean(losses[one.text.source], one)) for one in cuts}
        said["bytes"] = folder_bytes(folder)
    except NumericalError as error:
        return said | {"failed": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # nothing is there of what was refused
    file = f"{name}.safetensors"
    commit_tensors(work / "losses" / file, losses)
    return said | costs(made) | {"losses": file, "perplexity": perplexities}


def _losses(model: PreTrainedModel, cuts: Sequence[Windows]) -> Losses:
    return {one.text.source: window_losses(model, one) for one in cuts}


def _mean(losses: Tensor, windows: Windows) -> float:
    counts = windows.predictions()
    return float((losses * counts).sum() / counts.sum())


def _row_of(rows: Sequence[Row], way: str, keep: float, seed: int) -> Row | None:
    found = [row for row in rows if (row["way"], row["keep"], row["seed"]) == (way, keep, seed)]
    return found[0] if found else None


# --- judging ----------------------------------------------------------------------------------------------------------


def places(content: dict[str, Any]) -> dict[str, list[str]]:
    """Where ways are compared: every text by itself, and the mean of those others than the first that the dense model
    models."""
    texts = [one["text"] for one in content["dense"]]
    others = [one["text"] for one in content["dense"][1:] if one["modelled"]]
    return {text: [text] for text in texts} | ({OTHERS: others} if len(others) > 1 else {})


def perplexity(row: Row, texts: Sequence[str]) -> float:
    """The geometric mean over texts."""
    return math.exp(fmean(math.log(row["perplexity"][text]) for text in texts))


def verdict(
    content: dict[str, Any], best: Mapping[float, Entry], losses_of: Callable[[Row], Losses]
) -> list[dict[str, Any]]:
    """Per size, place and seed: what is judged, the strongest of the others there, and what pairing says of them.
    `losses_of`: row → its losses."""
    found = []
    ours_at_some_size = {entry.way for entry in best.values()}
    for keep in _keeps(content):
        way = judged(best, keep).way
        for place, texts in places(content).items():
            for seed in _seeds(content):
                said: dict[str, Any] = {"keep": keep, "place": place, "seed": seed, "way": way}
                rows = [row for row in _with_result(content) if (row["keep"], row["seed"]) == (keep, seed)]
                own = next((row for row in rows if row["way"] == way), None)
                rivals = [row for row in rows if row["way"] not in ours_at_some_size]
                if own is not None and rivals:
                    strongest = min(rivals, key=lambda row: perplexity(row, texts))
                    ours, theirs = losses_of(own), losses_of(strongest)
                    pair = paired_over([(ours[text], theirs[text]) for text in texts])
                    said |= {"perplexity": perplexity(own, texts), "strongest": strongest["way"]}
                    said |= {"strongest_perplexity": perplexity(strongest, texts), "lower": pair.is_lower}
                    said |= {"ratio": pair.ratio, "ratio_interval": pair.ratio_interval, **asdict(pair)}
                found.append(said)
    return found


# --- showing ----------------------------------------------------------------------------------------------------------


def markdown(content: dict[str, Any]) -> str:
    lines = ["Regenerate with:", *(f"- `{command}`" for command in content["commands"]), ""]
    for way, said in groupby(content["verdict"], key=lambda said: said["way"]):
        sizes = ", ".join(str(keep) for keep in dict.fromkeys(one["keep"] for one in said))
        lines += [f"Judged at keep {sizes}: **{way}**.", ""]
    lines += [*_dense_table(content), "", *_verdict_table(content), ""]
    for place, texts in places(content).items():
        lines += [f"## {place}", "", *_perplexity_table(content, texts), ""]
    lines += ["## What it takes", "", *_cost_table(content), ""]
    empty = [(row, key) for row in content["rows"] for key in NO_RESULT if key in row]
    if empty:
        lines += ["## No result", "", "| way | keep | seed | what | why |", "|---|--:|--:|---|---|"]
        for row, key in empty:
            reason = " ".join(row[key].split()).replace("|", "\\|")
            lines.append(f"| {row['way']} | {row['keep']} | {row['seed']} | {key} | {reason} |")
    return "\n".join(lines).rstrip() + "\n"


def _dense_table(content: dict[str, Any]) -> Iterator[str]:
    yield "| text | windows | tokens predicted | dense perplexity | of pairs of its tokens | counts in the mean |"
    yield "|---|--:|--:|--:|--:|---|"
    for number, one in enumerate(content["dense"]):
        counts = (
            "judged alone" if number == 0 else "yes" if one["modelled"] else "no: the dense model does not model it"
        )
        figures = (
            f"{one['windows']} of {one['length']} | {one['tokens']} | {one['perplexity']:.3f} | {one['pairs']:.1f}"
        )
        yield f"| {one['text']} | {figures} | {counts} |"


def _verdict_table(content: dict[str, Any]) -> Iterator[str]:
    yield "Ratio: perplexity of the judged over that of the strongest other way, with a 95 % interval over windows."
    yield ""
    yield "| keep | text | seed | perplexity | strongest other | its perplexity | ratio | lower |"
    yield "|--:|---|--:|--:|---|--:|--:|---|"
    for said in content["verdict"]:
        head = f"| {said['keep']} | {said['place']} | {said['seed']} |"
        if "ratio" not in said:
            yield f"{head} – | – | – | – | no result |"
            continue
        low, high = said["ratio_interval"]
        answer = "yes" if said["lower"] else "no" if min(low, said["ratio"]) > 1 else "not told apart"
        yield (
            f"{head} {said['perplexity']:.3f} | {said['strongest']} | {said['strongest_perplexity']:.3f} | "
            f"{said['ratio']:.4f} ({low:.4f} to {high:.4f}) | {answer} |"
        )


def _perplexity_table(content: dict[str, Any], texts: Sequence[str]) -> Iterator[str]:
    """Mean ± standard deviation over seeds, and of how many where not of all; the lowest mean over all is bold."""
    ways, keeps = _ways(content), _keeps(content)
    yield "| way |" + "".join(f" keep {keep} |" for keep in keeps)
    yield "|---|" + "--:|" * len(keeps)
    found = {
        (way, keep): [perplexity(row, texts) for row in _with_result(content, way, keep)]
        for way in ways
        for keep in keeps
    }
    of_all = {key: fmean(values) for key, values in found.items() if len(values) == len(_seeds(content))}
    lowest = {keep: min((mean for (_, at), mean in of_all.items() if at == keep), default=None) for keep in keeps}
    for way in ways:
        cells = []
        for keep in keeps:
            values = found[way, keep]
            if not values:
                cells.append("–")
                continue
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            said = f"{fmean(values):.2f}{spread}" + ("" if len(values) == len(_seeds(content)) else f" ({len(values)})")
            cells.append(f"**{said}**" if fmean(values) == lowest[keep] else said)
        yield f"| {way} | " + " | ".join(cells) + " |"


def _cost_table(content: dict[str, Any]) -> Iterator[str]:
    yield "| way | keep | kept | folder | seconds | memory | left dense | degraded | trained on |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|---|"
    for way in _ways(content):
        for keep in _keeps(content):
            rows = _with_result(content, way, keep)
            if not rows:
                continue
            peaks = [row["peak_bytes"] - row["resident_bytes"] for row in rows if row["peak_bytes"] is not None]
            trained = ", ".join(rows[0]["trained_on"] or []) or "nothing"
            yield (
                f"| {way} | {keep} | {fmean(row['kept'] for row in rows):.4f} | "
                f"{format_value(fmean(row['bytes'] for row in rows), 'bytes')} | "
                f"{fmean(row['seconds'] for row in rows):.1f} | {format_value(max(peaks, default=None), 'bytes')} | "
                f"{max(row['left_dense'] for row in rows)} | {max(row['degraded'] for row in rows)} | {trained} |"
            )


def _with_result(content: dict[str, Any], way: str | None = None, keep: float | None = None) -> list[Row]:
    rows: list[Row] = [row for row in content["rows"] if "losses" in row]
    return [row for row in rows if way in (None, row["way"]) and keep in (None, row["keep"])]


def _ways(content: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in _with_result(content)))


def _keeps(content: dict[str, Any]) -> list[float]:
    return sorted({row["keep"] for row in _with_result(content)}, reverse=True)


def _seeds(content: dict[str, Any]) -> list[int]:
    return sorted({row["seed"] for row in _with_result(content)})


# --- asking -----------------------------------------------------------------------------------------------------------


def best_of(names: Sequence[str]) -> dict[float, Entry]:
    """What is judged, under its own size; that of a single name does not matter.  Raises RecipeError for what cannot be
    told apart by size."""
    if len(names) == 1:
        return {1.0: entry_named(names[0])}
    best: dict[float, Entry] = {}
    for name in names:
        if not name.endswith(".toml"):
            raise RecipeError(f"--best {name}: of several each needs a size that it is meant for; name recipes (.toml)")
        entry = entry_named(name)
        (own,) = (step.keep for step in read_recipe(Path(name)).step if getattr(step, "keep", None) is not None)
        if own in best:
            raise RecipeError(f"--best {name}: keep {own} is that of another recipe too; give each a size of its own")
        best[own] = entry
    return best


def entry_named(name: str) -> Entry:
    """A recipe file, or a way of the bench.  Raises RecipeError for neither."""
    if name.endswith(".toml"):
        return entry_of(read_recipe(Path(name)))
    ways = {entry.way: entry for entry in LOW_RANK}
    if name not in ways:
        raise RecipeError(unknown("way", name, ways))
    return ways[name]


def rivals_of(best: Sequence[Entry], names: Sequence[str] | None, group: str | None) -> list[Entry]:
    """The others, or all low-rank entries of the group; the best themselves are none of them."""
    if names is None:
        of_group = group or best[0].compared_with
        others = [entry for entry in LOW_RANK if entry.sizes == "keep" and entry.compared_with == of_group]
    else:
        others = [entry_named(name) for name in names]
    return [entry for entry in others if entry.way not in {one.way for one in best}]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--best", nargs="+", required=True, help="a recipe (.toml) or way of the bench, or recipes")
    parser.add_argument("--against", nargs="+", help="ways of the bench, or recipes; default: all of the group")
    parser.add_argument("--group", choices=GROUPS, help="of the others; default: that of the best")
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--calibrate", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=Calibration.samples)
    parser.add_argument("--own-text", type=float, default=Calibration.own_text, help="share that the model writes")
    parser.add_argument("--length", type=int)
    parser.add_argument("--windows", type=int, help="only the first so many of each text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("docs/results/low_rank_verdict"))
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(given)
    disable_progress_bar()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    best = best_of(asked.best)
    trial = Trial(
        asked.model,
        best,
        rivals_of(list(best.values()), asked.against, asked.group),
        asked.text,
        Calibration(asked.calibrate, samples=asked.samples, length=asked.length, own_text=asked.own_text),
        asked.keep,
        asked.seed,
        asked.length,
        asked.windows,
        asked.device,
    )
    run(trial, asked.out, shlex.join(["python", "tools/low_rank_verdict.py", *given]))


if __name__ == "__main__":
    main()
