"""Rows as Markdown: what came out text by text, then what it took, then what was refused.

Only rows of one group stand in one table (see `entry.GROUPS`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from tersely.bench.entry import GROUPS, way
from tersely.bench.running import NO_RESULT, Row
from tersely.report.naming import PEER
from tersely.report.rows import format_value

GAP = "–"

STAGES = (
    "Stage by stage, in percent of the seconds above, all sizes together; what is left to 100 is opening and writing. "
    "A stage that read what an earlier row had gathered takes nothing."
)


BESIDE = (
    "Ratio: our perplexity over that of the package, with a 95 % interval over windows that both models read; below 1 "
    "ours is lower. Bold where all of the interval is. Bits per weight and seconds: ours / theirs."
)


def markdown(rows: Sequence[Row], command: str, beside: Sequence[Mapping[str, Any]] = ()) -> str:
    """Per text a line per way to compress, a column per size, with perplexity and KL, and those of a single size below;
    then a table of what every way takes, and one of those that could not be gone.  `beside`: see `beside_peers`."""
    done = [row for row in rows if not any(key in row for key in NO_RESULT)]
    lines = [f"Regenerate with `{command}`.", ""]
    for text in dict.fromkeys(row["text"] for row in done):
        of_text = [row for row in done if row["text"] == text]
        lines += [f"## {text}", "", _protocol(of_text[0]), ""]
        lines += _grouped(of_text, _results, "###")
    if beside:
        lines += ["## Beside other packages", "", BESIDE, "", *_beside(beside)]
    if done:
        lines += ["## What it takes", "", _legend(done), "", *_grouped(done, _taken, "###")]
        lines += ["## Where the seconds go", "", STAGES, "", *_grouped(done, _stages, "###")]
    if len(done) < len(rows):
        lines += ["## No result", "", *_without(rows)]
    return "\n".join(lines)


def _protocol(row: Row) -> str:
    protocol = row["protocol"]
    first = protocol["first_token"] or "none"
    return (
        f"Dense perplexity {row['dense_perplexity']:.3f}; {protocol['windows']} windows of {protocol['length']}, "
        f"stride {protocol['stride']}, first token {first}, {protocol['dtype']}, sha256 {protocol['sha256'][:12]}. "
        "KL to dense in nats per token."
    )


def _grouped(rows: Sequence[Row], table: Callable[[Sequence[Row]], list[str]], heading: str) -> Iterator[str]:
    """A table for each group that has rows; with a heading where there are several."""
    present = [group for group in GROUPS if any(row["group"] == group for row in rows)]
    for group in present:
        if len(present) > 1:
            yield from (f"{heading} {group.capitalize()}", "")
        yield from table([row for row in rows if row["group"] == group])


def _results(rows: Sequence[Row]) -> list[str]:
    sized, single = [row for row in rows if "keep" in row], [row for row in rows if "keep" not in row]
    return [*(_by_size(sized) if sized else []), *(_one_by_one(single) if single else [])]


def _by_size(rows: Sequence[Row]) -> list[str]:
    keeps = _keeps(rows)
    lines = ["| way |" + "".join(f" keep {keep} |" for keep in keeps), "|---|" + "--:|" * len(keeps)]
    for said, of_way in _by_way(rows):
        cells = []
        for keep in keeps:
            found = [row for row in of_way if row["keep"] == keep]
            cells.append(f" {found[0]['perplexity']:.2f} ({found[0]['kl']:.3f}) |" if found else " |")
        lines.append(f"| {said} |" + "".join(cells))
    return [*lines, ""]


def _one_by_one(rows: Sequence[Row]) -> list[str]:
    lines = ["| way | bits per weight | folder | perplexity | KL | seconds |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        lines.append(
            f"| {_way(row)} | {row['bits_per_weight']:.3f} | {format_value(row['bytes'], 'bytes')} | "
            f"{row['perplexity']:.2f} | {row['kl']:.4f} | {row['seconds']:.1f} |"
        )
    return [*lines, ""]


def _beside(beside: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line for every two ways, one column for every text."""
    texts = list(dict.fromkeys(one["text"] for one in beside))
    yield "| package | ours | bits | " + " | ".join(texts) + " | seconds |"
    yield "|---|---|--:|" + "--:|" * len(texts) + "--:|"
    pairs: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for one in beside:
        pairs.setdefault((one["peer"], one["ours"]), {})[one["text"]] = one
    for (theirs, ours), of_text in pairs.items():
        first = next(iter(of_text.values()))
        bits = " / ".join(f"{bits:.2f}" for bits in first["bits_per_weight"])
        seconds = " / ".join(f"{seconds:.1f}" for seconds in first["seconds"])
        ratios = (_ratio(of_text[text]) if text in of_text else GAP for text in texts)
        yield f"| {theirs} | {ours} | {bits} | " + " | ".join(ratios) + f" | {seconds} |"
    yield ""


def _ratio(one: Mapping[str, Any]) -> str:
    low, high = one["ratio_interval"]
    said = f"{one['ratio']:.4f} ({low:.4f} to {high:.4f})"
    return f"**{said}**" if one["lower"] else said


def _legend(rows: Sequence[Row]) -> str:
    keeps = _keeps(rows)
    order = f" Several figures in a cell: keep {' / '.join(map(str, keeps))}." if len(keeps) > 1 else ""
    return (
        "Kept: bytes of the touched weights on disk, relative to dense (removed: what is missing to 1). × dense: "
        "perplexity relative to the dense model's, geometric mean over the texts. Seconds and memory are those of "
        "compressing: the first way that needs a statistic pays for gathering it; memory is what the process held "
        f"at most beyond what it held before, the largest of all sizes.{order}{_of_peers(rows)}"
    )


def _of_peers(rows: Sequence[Row]) -> str:
    if not any(row["method"].startswith(PEER) for row in rows):
        return ""
    return (
        " A peer is another package, run in an environment of its own on the same calibration windows; what is "
        "evaluated are its dequantized weights in float32. Its seconds are those of its own call, without start, "
        "import, reading and writing, the best of three where that is short; its bytes are counted from its format: "
        "codes, scales, zero points and second scales, without padding."
    )


def _taken(rows: Sequence[Row]) -> list[str]:
    """One line a way; rows of several texts say the same of what it took."""
    columns = ("way", "kept", "folder, MB", "× dense", "seconds", "memory", "left dense", "degraded", "trained on")
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * 7 + "---|"]
    for said, of_way in _by_way(rows):
        sizes = _by_size_of(of_way)
        first = [of_text[0] for of_text in sizes]
        extra = [row["peak_bytes"] - row["resident_bytes"] for row in first if row["peak_bytes"] is not None]
        cells = (
            said,
            _each(f"{row['kept']:.3f}" if row["kept"] is not None else GAP for row in first),
            _each(f"{row['bytes'] / 1e6:.1f}" for row in first),
            _each(f"{_relative(of_text):.2f}" for of_text in sizes),
            _each(f"{row['seconds']:.1f}" for row in first),
            format_value(max(extra), "bytes") if extra else GAP,
            _each(str(row["left_dense"]) for row in first),
            _each(str(row["degraded"]) for row in first),
            ", ".join(first[0]["trained_on"] or []) or "nothing",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _stages(rows: Sequence[Row]) -> list[str]:
    """One line a way, one column for every stage that any of them has."""
    stages = [stage for stage in dict.fromkeys(s for row in rows for s in row["stages"]) if stage != "everything"]
    lines = ["| way | seconds | " + " | ".join(stages) + " |", "|---|" + "--:|" * (1 + len(stages))]
    for said, of_way in _by_way(rows):
        spent = [of_way[0]["stages"] for of_way in _by_size_of(of_way)]
        whole = sum(of_size["everything"] for of_size in spent)
        shares = [sum(of_size.get(stage, 0.0) for of_size in spent) / (whole or 1.0) for stage in stages]
        cells = [f"{100 * share:.0f}" if share >= 0.005 else "" for share in shares]
        lines.append(f"| {said} | {whole:.1f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _by_size_of(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of one way, those of every text together, by falling size."""
    of_size: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -row.get("keep", 0)):
        of_size.setdefault(row.get("keep"), []).append(row)
    return list(of_size.values())


def _relative(rows: Sequence[Row]) -> float:
    return math.exp(fmean(math.log(row["relative_perplexity"]) for row in rows))


def _each(cells: Iterator[str]) -> str:
    """Figures of every size, or one where all are the same."""
    said = list(cells)
    return said[0] if len(set(said)) == 1 else " / ".join(said)


def _without(rows: Sequence[Row]) -> Iterator[str]:
    yield from ("| way | keep | what | why |", "|---|--:|---|---|")
    for row in rows:
        for what in NO_RESULT:
            if what in row:
                reason = " ".join(row[what].split()).replace("|", "\\|")
                yield f"| {_way(row)} | {row.get('keep', GAP)} | {what} | {reason} |"
    yield ""


def _keeps(rows: Sequence[Row]) -> list[float]:
    return sorted({row["keep"] for row in rows if "keep" in row}, reverse=True)


def _by_way(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for said in dict.fromkeys(_way(row) for row in rows):
        yield said, [row for row in rows if _way(row) == said]


def _way(row: Row) -> str:
    return way(row["method"], row["options"])
