"""What was gained and what was lost, in one sentence and a few figures.

Every figure says where in ``report.json`` it stands, so that the page can be checked against it.  Quality and speed
hold under one protocol, which is said beside them; what a run did not measure is absent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tersely.report.naming import short_text
from tersely.report.reading import Json, Run
from tersely.report.rows import format_value
from tersely.report.tables import number_text

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Figure:
    """One number of the first screen."""

    label: str
    path: Path
    """Keys and positions that lead to it in ``report.json``."""
    value: float
    text: str
    before: str = ""
    """The same of the dense model."""
    change: str = ""
    """That number relative to it."""
    interval: str = ""
    """95 % of the number."""
    note: str = ""
    """What else should be known beside it."""
    change_interval: str = ""
    """95 % of the change, which is known far better where both read the same windows."""

    @property
    def place(self) -> str:
        return ".".join(map(str, self.path))


@dataclass(frozen=True)
class Verdict:
    sentence: str
    figures: tuple[Figure, ...]
    protocol: str
    """Of the quality; empty where none was measured."""
    unmeasured: str
    """What the figures lack, and the command that measures it."""


def verdict(run: Run) -> Verdict:
    size, quality, speed = list(_size(run)), list(_quality(run)), list(_speed(run))
    texts = run.evaluation.get("texts") or []
    lacking = [name for name, found in (("quality", quality), ("speed", speed)) if not found]
    command = f"tersely eval {run.folder.name if run.folder else 'OUT'} --json FILE" + ("" if speed else " --speed")
    unmeasured = (
        f"Not measured: {' and '.join(lacking)}. {command} measures, and tersely report shows." if lacking else ""
    )
    return Verdict(_sentence(run), (*size, *quality, *speed), protocol_text(texts[0]) if texts else "", unmeasured)


def protocol_text(text: Json) -> str:
    """Under which protocol a number was measured."""
    inner = text.get("protocol")
    said = {**text, **inner} if isinstance(inner, dict) else text
    words = [short_text(str(said["text"]))] if said.get("text") else []
    if isinstance(inner, str):
        words.append(f"protocol {inner}")
        words += [str(said["corpus"])] if said.get("corpus") else []
        departures = said.get("departures") or []
        words += [f"departing from it: {', '.join(map(str, departures))}"] if departures else []
    if "windows" in said and "length" in said:
        words.append(f"{said['windows']} windows of {said['length']} tokens")
    if "stride" in said:
        words.append(f"stride {said['stride']}")
    if "first_token" in said:
        words.append(f"first token {'none' if said['first_token'] is None else said['first_token']}")
    if "dtype" in said:
        words.append(str(said["dtype"]))
    if "tokens" in said:
        words.append(f"{said['tokens']:,} predicted tokens")
    if said.get("sha256"):
        words.append(f"sha256 {str(said['sha256'])[:12]}")
    return ", ".join(words)


def _size(run: Run) -> Iterator[Figure]:
    rows = {row["name"]: (number, row) for number, row in enumerate(run.report.get("rows") or [])}
    for name in ("checkpoint", "cache per token", "bits per touched weight"):
        if name not in rows:
            continue
        number, row = rows[name]
        value, before = row["value"], row.get("before")
        yield Figure(
            label=name.replace("touched ", ""),
            path=("rows", number, "value"),
            value=value,
            text=format_value(value, row["unit"]),
            before=format_value(before, row["unit"]) if before is not None else "",
            change=_times(value, before),
        )


def _quality(run: Run) -> Iterator[Figure]:
    """Of the first text: it is the one that was named first."""
    texts = run.evaluation.get("texts") or []
    for number, text in enumerate(texts[:1]):
        place: Path = ("evaluation", "texts", number)
        dense = text.get("dense_perplexity")
        yield Figure(
            label="perplexity",
            path=(*place, "perplexity"),
            value=text["perplexity"],
            text=number_text(text["perplexity"], "perplexity"),
            before=number_text(dense, "perplexity") if dense is not None else "",
            change=_times(text["perplexity"], dense),
            interval=interval_text(text, "perplexity", "perplexity"),
            change_interval=interval_text(text, "perplexity_ratio", ".3f"),
        )
        for key, label, unit in (("kl", "KL to dense, nats", ".4f"), ("top1", "same likeliest token", ".1%")):
            if text.get(key) is not None:
                yield Figure(
                    label=label,
                    path=(*place, key),
                    value=text[key],
                    text=number_text(text[key], unit),
                    interval=interval_text(text, key, unit),
                )


def _speed(run: Run) -> Iterator[Figure]:
    """Of decoding, which one waits for; the page has prefill further down."""
    speed, dense = map(_decoding, speeds(run))
    if speed is not None:
        yield Figure(
            label="decode, tokens/s",
            path=("evaluation", "speed", *speed.path),
            value=speed.rate,
            text=number_text(speed.rate, "count"),
            before=number_text(dense.rate, "count") if dense is not None else "",
            change=_times(speed.rate, dense.rate if dense is not None else None),
            note="quartiles " + "–".join(number_text(end, "count") for end in speed.quartiles)
            if speed.quartiles
            else "",
        )


def speeds(run: Run) -> tuple[Json, Json]:
    """What was measured of the speed of the run, and of its dense model."""
    found = run.evaluation.get("speed") or {}
    return found, found.get("dense") or run.evaluation.get("dense_speed") or {}


@dataclass(frozen=True)
class _Decoding:
    """Tokens per second of one sequence."""

    path: Path
    rate: float
    quartiles: tuple[float, float] | None = None

    def overlaps(self, other: "_Decoding") -> bool:
        if self.quartiles is None or other.quartiles is None:
            return False
        return self.quartiles[0] <= other.quartiles[1] and other.quartiles[0] <= self.quartiles[1]


def _decoding(speed: Json) -> _Decoding | None:
    """From the fuller account with its quartiles, where there is one."""
    for number, one in enumerate(speed.get("batches") or []):
        found = one.get("decode_tokens_per_second")
        if one.get("batch") == 1 and isinstance(found, Mapping) and found.keys() >= {"median", "lower", "upper"}:
            path = ("batches", number, "decode_tokens_per_second", "median")
            return _Decoding(path, found["median"], (found["lower"], found["upper"]))
    rate = speed.get("decode_tokens_per_second")
    return None if rate is None else _Decoding(("decode_tokens_per_second",), rate)


def interval_text(measured: Json, key: str, unit: str) -> str:
    """The interval of a number, where the measurement gave one."""
    found = measured.get(f"{key}_interval")
    if not isinstance(found, Sequence) or len(found) != 2:
        return ""
    low, high = (number_text(float(end), unit) for end in found)
    return f"{low}–{high}"


def _sentence(run: Run) -> str:
    """The shortest account of a run, from what it measured."""
    parts = []
    rows = {row["name"]: row for row in run.report.get("rows") or []}
    row = rows.get("checkpoint")
    if row and row.get("before"):
        now, before = (format_value(row[key], row["unit"]) for key in ("value", "before"))
        parts.append(f"{_less(row['value'] / row['before'])}: {now} of {before}")
    for text in (run.evaluation.get("texts") or [])[:1]:
        if text.get("dense_perplexity"):
            ratio = text["perplexity"] / text["dense_perplexity"]
            now, before = (number_text(text[key], "perplexity") for key in ("perplexity", "dense_perplexity"))
            parts.append(f"perplexity {now} where the dense model has {before} (× {ratio:.2f})")
        else:
            parts.append(f"perplexity {number_text(text['perplexity'], 'perplexity')}")
    decoding, dense_decoding = map(_decoding, speeds(run))
    if decoding is not None and dense_decoding is not None:
        if decoding.overlaps(dense_decoding):
            parts.append("decoding no faster and no slower than dense, within the spread of the measurement")
        else:
            parts.append(f"decoding at × {decoding.rate / dense_decoding.rate:.2f} the dense model's pace")
    sentence = "; ".join(parts).replace("× ", "×\u00a0")  # a factor stays on the line of its sign
    return sentence[:1].upper() + sentence[1:] + "." if sentence else ""


def _less(ratio: float) -> str:
    if abs(ratio - 1) < 0.0005:
        return "as large as before on disk"
    return f"{number_text(abs(1 - ratio), '.1%')} {'smaller' if ratio < 1 else 'larger'} on disk"


def _times(value: Any, before: Any) -> str:
    if not before:
        return ""
    ratio = value / before
    return f"× {ratio:.2f}" if ratio >= 0.1 else f"× {ratio:.2g}"
