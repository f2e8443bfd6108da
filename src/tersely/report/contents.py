"""What a page says of one run, section by section; what the run did not measure has no section."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tersely.report import plots
from tersely.report.naming import short_text
from tersely.report.plots import Plot
from tersely.report.reading import Json, Run
from tersely.report.rows import format_amount, format_value
from tersely.report.tables import Column, Table, facts, number_text, table
from tersely.report.verdict import Verdict, interval_text, speeds


@dataclass(frozen=True)
class Sample:
    """A prompt, and who went on with it how."""

    prompt: str
    said: tuple[tuple[str, str], ...]
    note: str = ""


@dataclass(frozen=True)
class Inner:
    """One run inside a comparison."""

    run: Run
    verdict: Verdict
    plots: tuple[Plot, ...]
    tables: tuple[Table, ...]
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    key: str
    """Anchor: letters and dashes."""
    title: str
    lead: str = ""
    facts: Sequence[tuple[str, str]] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    files: Sequence[tuple[str, str]] = ()
    runs: Sequence[Inner] = ()
    wide: bool = False
    """Plots below each other, however much room there is."""

    @property
    def is_empty(self) -> bool:
        return not (self.facts or self.plots or self.tables or self.samples or self.files or self.runs)


def there(*found: Any) -> list[Any]:
    """Those that are not None."""
    return [one for one in found if one is not None]


RESUMED = (
    "This run was stopped and gone on with: time and memory are those of its last start, and of training that an "
    "earlier one finished."
)


def sections(run: Run) -> list[Section]:
    """Of a page about one run, in reading order, without those that are empty."""
    wide = max((len(view["x"]) for plot in there(plots.amounts(run)) for view in plot.views), default=0) > 12
    all_sections = [
        Section(
            "quality",
            "Quality",
            tables=there(texts(run), tasks(run), speed(run), batches(run)),
            lead="Perplexities are compared on the same windows of the same text only.",
        ),
        Section("drift", "Drift by depth", plots=there(plots.drift(run))),
        Section("steps", "Steps", tables=there(steps(run)), lead="Each row is the model after that step."),
        Section("where", "Where", plots=there(plots.amounts(run), plots.errors(run)), wide=wide),
        Section("spectra", "Spectra and cuts", plots=there(plots.spectra(run))),
        Section("size", "Size", tables=there(sizes(run))),
        Section(
            "untouched",
            "Kept dense or degraded",
            tables=there(untouched(run)),
            lead="Degraded: left against the plan. Kept: nothing was to be done to it. Dense by the plan: nothing was "
            "asked of it.",
        ),
        Section("calibration", "Calibration", facts=_calibration(run), tables=there(coverage(run))),
        Section(
            "time",
            "Time and memory",
            plots=there(plots.stages(run), plots.memory(run)),
            tables=there(time(run)),
            lead=RESUMED if run.report.get("resumed") else "",
        ),
        Section("samples", "Samples", samples=list(_samples(run))),
        Section("sites", "Every site", tables=there(sites(run))),
        Section("opens", "Opens in", tables=there(opens(run))),
        Section("origin", "Recipe, plan, versions", facts=_origin(run), files=files(run), tables=there(sums(run))),
    ]
    return [one for one in all_sections if not one.is_empty]


# --- what came out ----------------------------------------------------------------------------------------------------


def sizes(run: Run) -> Table | None:
    columns = [
        Column("what"),
        Column("now", "number"),
        Column("before", "number"),
        Column("ratio", "number", ".3f"),
        Column("measured as"),
    ]
    lines = []
    for row in run.report.get("rows") or []:
        ratio = row["value"] / row["before"] if row.get("before") else None
        # the unit belongs to the row, not to the column: numbers are written out here
        said = [
            format_value(row[key], row["unit"]) if row.get(key) is not None else None for key in ("value", "before")
        ]
        lines.append([row["name"], *said, ratio, row.get("how")])
    return table("Sizes before and after", columns, lines)


def texts(run: Run) -> Table | None:
    columns = [
        Column("text"),
        Column("perplexity", "number", "perplexity"),
        Column("95 % interval", "number"),
        Column("dense", "number", "perplexity"),
        Column("× dense", "number", ".3f"),
        Column("95 % interval of × dense", "number"),
        Column("KL, nats/token", "number", ".4f"),
        Column("same likeliest token", "number", ".1%"),
        *(Column(name, "number", ".4f") for name in ("byte perplexity", "bits per byte")),
        Column("protocol"),
        Column("quirks"),
        Column("departures from its code"),
        Column("windows", "number", "count"),
        Column("length", "number", "count"),
        Column("stride", "number", "count"),
        Column("first token"),
        Column("dtype"),
        Column("predicted tokens", "number", "count"),
        Column("sha256", "code"),
    ]
    lines = []
    for text in run.evaluation.get("texts") or []:
        dense = text.get("dense_perplexity")
        lines.append(
            [
                short_text(str(text.get("text", ""))),
                text["perplexity"],
                interval_text(text, "perplexity", "perplexity"),
                dense,
                text["perplexity"] / dense if dense else None,
                interval_text(text, "perplexity_ratio", ".3f"),
                text.get("kl"),
                text.get("top1"),
                *(text.get(key) for key in ("byte_perplexity", "bits_per_byte")),
                text.get("protocol"),
                "; ".join(map(str, (text.get("definition") or {}).get("quirks") or [])),
                "; ".join(map(str, text.get("departures") or [])),
                *(text.get(key) for key in ("windows", "length", "stride")),
                "none" if text.get("first_token", "") is None else text.get("first_token"),
                text.get("dtype"),
                text.get("tokens"),
                str(text.get("sha256", ""))[:12],
            ]
        )
    return table("Quality on every text", columns, lines)


def tasks(run: Run) -> Table | None:
    columns = [
        Column("task"),
        Column("metric"),
        Column("value", "number", ".4f"),
        Column("standard error", "number", ".4f"),
        Column("dense", "number", ".4f"),
        Column("chance", "number", ".4f"),
        Column("examples", "number", "count"),
    ]
    lines = [
        [task.get(key) for key in ("task", "metric", "value", "stderr", "dense_value", "floor", "n")]
        for task in run.evaluation.get("tasks") or []
    ]
    return table("Tasks", columns, lines)


def speed(run: Run) -> Table | None:
    """Whatever was measured under the name of speed, beside the dense model's where that was measured as well."""
    found, dense = speeds(run)
    lines = []
    for key, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            before = dense.get(key)
            unit = "bytes" if key.endswith("bytes") else ""
            said = [number_text(float(one), unit) if one is not None else None for one in (value, before)]
            lines.append([key.replace("_bytes", " memory").replace("_", " "), *said, _over(value, before)])
    columns = [
        Column("speed and memory"),
        Column("now", "number"),
        Column("dense", "number"),
        Column("ratio", "number", ".3f"),
    ]
    return table("Speed and memory", columns, lines)


def _over(value: float, before: float | None) -> float | None:
    return value / before if before else None


def batches(run: Run) -> Table | None:
    """The fuller account of speed: medians and quartiles for one sequence and for several at once."""
    found, dense = speeds(run)
    before = {one.get("batch"): one for one in dense.get("batches") or []}
    lines = []
    for one in found.get("batches") or []:
        for key, value in one.items():
            if key in ("batch", "prefill_tokens", "prompt_tokens", "new_tokens"):
                continue
            now, then = _middle(value), _middle((before.get(one.get("batch")) or {}).get(key))
            if now is not None:
                of_one = [_said_middle(key, it) for it in (value, (before.get(one.get("batch")) or {}).get(key))]
                lines.append([one.get("batch"), key.replace("_", " "), *of_one, _over(now, then)])
    columns = [
        Column("sequences", "number", "count"),
        Column("measure"),
        Column("median (quartiles)", "number"),
        Column("dense"),
        Column("ratio", "number", ".3f"),
    ]
    return table("Speed with several sequences at once", columns, lines)


def _middle(value: Any) -> float | None:
    found = value.get("median") if isinstance(value, Mapping) else value
    return float(found) if isinstance(found, int | float) else None


def _said_middle(key: str, value: Any) -> str | None:
    unit = "bytes" if "bytes" in key else ""
    if isinstance(value, Mapping) and value.get("median") is not None:
        middle, *ends = (number_text(value[name], unit) for name in ("median", "lower", "upper") if name in value)
        return f"{middle} ({' to '.join(ends)})" if ends else middle
    return number_text(float(value), unit) if isinstance(value, int | float) else None


def steps(run: Run) -> Table | None:
    done = run.report.get("steps") or []
    if len(done) < 2:
        return None
    names = list(
        dict.fromkeys(text["text"] for step in done for text in (step.get("evaluation") or {}).get("texts") or [])
    )
    columns = [
        Column("step", "number", "count"),
        Column("what"),
        Column("weights on disk", "number", "bytes"),
        *(Column(f"perplexity, {short_text(name)}", "number", "perplexity") for name in names),
        Column("seconds", "number", ".1f"),
    ]
    lines = []
    for number, step in enumerate(done):
        measured = {text["text"]: text["perplexity"] for text in (step.get("evaluation") or {}).get("texts") or []}
        spent = sum((step.get("seconds") or {}).values()) or None
        figures = [measured.get(name) for name in names]
        lines.append([number + 1, f"{step['verb']} {step['name']}", step.get("bytes"), *figures, spent])
    return table("The model after every step", columns, lines)


# --- where ------------------------------------------------------------------------------------------------------------


def sites(run: Run) -> Table | None:
    columns = [
        Column("site", "code"),
        Column("role"),
        Column("out", "number", "count"),
        Column("in", "number", "count"),
        Column("method"),
        Column("amount", "number"),
        Column("bytes", "number", "count"),
        Column("of dense", "number", ".3f"),
        Column("predicted error", "number"),
        Column("measured error", "number"),
    ]
    lines = []
    for site in run.report.get("sites") or []:
        amount, dense = site.get("amount"), site.get("dense_bytes")
        is_left = amount is None
        lines.append(
            [
                site["name"],
                site.get("role"),
                site.get("out_features"),
                site.get("in_features"),
                "left dense" if is_left else site.get("method"),
                amount if isinstance(amount, int | float) else None if is_left else format_amount(amount),
                site.get("nbytes"),
                site["nbytes"] / dense if dense else None,
                None if is_left else site.get("predicted_error"),
                None if is_left else site.get("measured_error"),
            ]
        )
    return table("Every site", columns, lines)


def untouched(run: Run) -> Table | None:
    degraded: Json = run.report.get("degraded") or {}
    lines = [["degraded", name, None, reason] for name, reason in degraded.items()]
    for site in run.report.get("sites") or []:
        if site.get("amount") is None and site["name"] not in degraded:
            lines.append(["dense by the plan", site["name"], _shape(site), "the plan took nothing from it"])
    for kept in run.report.get("kept") or []:
        shape = " × ".join(map(str, kept.get("shape") or [])) or None
        lines.append(["kept", kept["name"], shape, kept.get("reason")])
    columns = [Column("state"), Column("what", "code"), Column("shape"), Column("why")]
    return table("Kept dense or degraded, and why", columns, lines)


def _shape(site: Json) -> str | None:
    return f"{site['out_features']} × {site['in_features']}" if site.get("out_features") else None


# --- what it took -----------------------------------------------------------------------------------------------------


def _calibration(run: Run) -> list[tuple[str, str]]:
    found = run.report.get("calibration") or {}
    if not found:
        return []
    return facts(
        {
            "texts": ", ".join(short_text(str(source)) for source in found.get("sources") or []),
            "windows": f"{found['samples']} of {found['length']} tokens" if "samples" in found else None,
            "tokens": f"{found['tokens']:,}" if "tokens" in found else None,
            "of them by the model itself": found.get("own") or None,
            "windows in the text": f"{found['available']:,}" if "available" in found else None,
            "sha256": found.get("sha256"),
        }
    )


def coverage(run: Run) -> Table | None:
    """How many tokens every channel of an input was seen with: second moments of fewer tokens than channels are
    singular."""
    tokens = (run.report.get("calibration") or {}).get("tokens")
    widths: dict[int, set[str]] = {}
    for site in run.report.get("sites") or []:
        if site.get("in_features"):
            widths.setdefault(site["in_features"], set()).add(str(site.get("role") or site["name"]))
    if not tokens or not widths:
        return None
    columns = [
        Column("inputs of width", "number", "count"),
        Column("tokens per channel", "number", ".1f"),
        Column("read by"),
    ]
    return table(
        "Calibration tokens per channel",
        columns,
        [[w, tokens / w, ", ".join(sorted(r))] for w, r in sorted(widths.items())],
    )


def time(run: Run) -> Table | None:
    """Stage by stage, and everything: in the time of it, and in the memory, things may have run between stages."""
    seconds, peaks = (run.report.get(key) or {} for key in ("seconds", "peak_bytes_by_stage"))
    whole, held = seconds.get("everything"), run.report.get("peak_bytes")
    columns = [
        Column("stage"),
        Column("seconds", "number", ".2f"),
        Column("of all", "number", ".0%"),
        Column(f"peak: {plots.held_by(run)}", "number", "bytes"),
    ]
    stages = [stage for stage in dict.fromkeys([*seconds, *peaks]) if stage != "everything"]
    lines: list[list[Any]] = [
        [stage, seconds.get(stage), seconds.get(stage, 0.0) / whole if whole else None, peaks.get(stage)]
        for stage in stages
    ]
    if whole is not None or held is not None:
        lines.append(["everything", whole, None, held])
    return table("Time and memory", columns, lines)


def _samples(run: Run) -> Iterator[Sample]:
    """A prompt with what both models make of it, as the evaluation left them."""
    for sample in run.evaluation.get("samples") or []:
        if not isinstance(sample, Mapping):
            continue
        said = [
            (name, str(sample[key])) for key, name in (("dense", "dense"), ("text", "compressed")) if sample.get(key)
        ]
        if said:
            agreeing = sample.get("agreeing")
            note = "" if agreeing is None else f"{agreeing} tokens agree before the first that differs"
            yield Sample(str(sample.get("prompt", "")), tuple(said), note)


# --- where it comes from and where it goes ----------------------------------------------------------------------------


def opens(run: Run) -> Table | None:
    """Commands that open the folder.  Empty while nobody knows where it will lie."""
    out = run.folder.name if run.folder else "OUT"
    lines = [
        [
            "transformers",
            f'import tersely; AutoModelForCausalLM.from_pretrained("{out}")',
            "the import makes the format known; without it, opening fails loudly",
        ],
        ["the terminal", f'tersely generate {out} --prompt "…"', "text, streaming"],
        ["tersely", f"tersely verify {out}", "checksums, manifest, finite weights, reopening"],
        [
            "any software, dense",
            f"tersely export {out} DEST --to dense",
            "the stock architecture at full size, or what has no counterpart there",
        ],
    ]
    if run.kinds and set(run.kinds) == {"quantized"}:
        lines.append(
            [
                "engines, packed",
                f"tersely export {out} DEST --to compressed-tensors",
                "the same integers in the format of compressed-tensors, or what has no counterpart there",
            ]
        )
    if run.kinds.get("sum"):
        lines.append(
            ["peft", f"tersely export {out} DEST --to peft", "the low-rank updates as an adapter over the dense model"]
        )
    return table("Opens in", [Column("where"), Column("command", "code"), Column("what to expect")], lines)


def _origin(run: Run) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in run.kinds.items())
    plan = "; ".join(
        f"step {number + 1}: {format_value(one['nbytes'], 'bytes')} of {format_value(one['budget'], 'bytes')} allowed"
        for number, one in enumerate((run.plan or {}).get("steps") or [])
        if isinstance(one, Mapping) and one.get("budget") is not None and one.get("nbytes") is not None
    )
    versions = ", ".join(f"{name} {version}" for name, version in (run.report.get("versions") or {}).items())
    return facts(
        {
            "dense model": run.model,
            "its sha256": run.report.get("base_sha256"),
            "seed": (run.report.get("recipe") or {}).get("seed"),
            "modules": kinds,
            "plan": plan,
            "versions": versions,
        }
    )


def files(run: Run) -> list[tuple[str, str]]:
    return [("recipe.toml", run.recipe)] if run.recipe else []


def sums(run: Run) -> Table | None:
    lines = list(run.checksums.items())
    return table("Checksums", [Column("file", "code"), Column("sha256", "code")], lines)
