"""The model card that is written into every output folder: what it is, what was measured, how it was made and opens.

The front matter has the fields that the hub reads (modelcard.md of huggingface/hub-docs).  What was measured stands
twice, in tables for people and in the `model-index` for the hub, each number with its protocol; what was not measured
has no row.  Every name that comes from outside (a model may be named anything) is written as characters, never as
Markdown, HTML, mathematics or YAML, and of a path on this machine no more is said than its last part.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tersely.checkpoint import LICENCE_FIELDS
from tersely.report.naming import named, place_of
from tersely.report.rows import Report, SiteRow, format_value, text_rows
from tersely.report.tables import is_there, number_text
from tersely.report.verdict import interval_text, protocol_text

Json = Mapping[str, Any]

HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}
"""How the class of a model ends → the class that opens it, and its task among the hub's."""

TAGS = {
    "low_rank": "low-rank", "pivoted": "low-rank", "remapped": "low-rank", "shared": "low-rank",
    "quantized": "quantized", "codebook": "quantized",
}  # fmt: skip
"""Kind of module → what people look for on the hub."""

IN_CODES = frozenset({"quantized", "codebook", "remapped"})
"""Kinds whose numbers are codes."""

SHOWN = 5
"""Names in a list before it says how many more there are."""


def model_card(
    report: Report,
    licence: Json,
    settings: Json | None = None,
    *,
    on_hub: bool | None = None,
) -> str:
    """Markdown with the hub's front matter.

    `licence` is the base model's: the fields `LICENCE_FIELDS` of its card, as far as it has them.  `settings` is
    the content of the folder's ``config.json``: without it the card says neither task nor relation to the base.
    `on_hub` says whether the model's name is one of the hub's; by default it is, unless there is such a folder here.
    """
    name, hub = named(report.model)
    if on_hub is False and hub is not None:
        name, hub = Path(report.model).name, None
    settings = settings or {}
    lines = ["---", _front(report, name, hub, licence, settings).to_yaml(line_break="\n"), "---", ""]
    lines += [f"# {escaped(name)}, compressed", "", *_what(report, name, hub, settings), ""]
    lines += [*_sizes(report), *_quality(report), *_errors(report), *_steps(report), *_left(report)]
    lines += [*_cautions(report), *_recipe(report), *_opening(settings)]
    return "\n".join(lines) + "\n"


# --- names from outside -----------------------------------------------------------------------------------------------

_MEANING = re.compile(r"[\\`*\[\]<>&#|~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)")
"""What Markdown, HTML, tables, the hub's mathematics and its mentions are written with; inside a word _ is a letter."""


def escaped(text: object) -> str:
    """Any text as one line of plain characters.  Entities, since a backslash may begin mathematics on the hub."""
    return _MEANING.sub(lambda found: f"&#{ord(found[0])};", _line(text))


def _line(text: object) -> str:
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())


def _code(text: object) -> str:
    """Any text as code."""
    line = str(text)
    return (
        f"`{line}`"
        if line.isprintable() and not re.search(r"[`|]|^\s|\s$|^$", line)
        else f"<code>{escaped(line)}</code>"
    )


# --- front matter -----------------------------------------------------------------------------------------------------


def _front(report: Report, name: str, hub: str | None, licence: Json, settings: Json) -> ModelCardData:
    fields = {key: licence[key] for key in LICENCE_FIELDS if isinstance(licence.get(key), str)}
    kinds = _kinds(settings)
    base = _base_of_difference(settings)
    if base is not None:
        hub = named(base)[1]
    tags = ["tersely", "compressed", *(TAGS[kind] for kind in kinds if kind in TAGS)]
    results = list(_results(report))
    return ModelCardData(
        base_model=hub,
        base_model_relation=_relation(kinds, base) if hub is not None and settings else None,
        library_name="transformers",
        pipeline_tag=_head(settings)[1],
        tags=[*tags, *(step["name"] for step in report.steps)],
        model_name=f"{_line(name)}, compressed" if results else None,
        eval_results=results or None,
        license=fields.get("license"),
        license_name=fields.get("license_name"),
        license_link=fields.get("license_link"),
    )


def _relation(kinds: Iterable[str], base: str | None) -> str:
    """The hub knows four relations: adapter, merge, quantized, finetune.  Whatever else is derived from a model and
    stands alone is a finetune to it, trained or not: a factored or pruned model has no word of its own there."""
    if base is not None:
        return "adapter"
    return "quantized" if IN_CODES & set(kinds) else "finetune"


def _results(report: Report) -> Iterator[EvalResult]:
    """Figures as the hub shows them.  The protocol goes with each metric: the hub joins results of one data set, under
    whatever protocol they were measured."""
    for text in text_rows(report.evaluation):
        keys = ("protocol", "departures", "length", "stride", "first_token", "dtype", "windows", "tokens", "sha256")
        said = {key: "none" if text[key] is None else text[key] for key in keys if key in text}
        corpus = _line(place_of(str(text["text"])))
        for key, metric, title in (
            ("perplexity", "perplexity", "Perplexity"),
            ("kl", "kl_divergence", "KL divergence to the dense model, nats per token"),
        ):
            if is_there(text.get(key)):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=corpus,
                    dataset_name=corpus,
                    metric_type=metric,
                    metric_name=title,
                    metric_value=text[key],
                    metric_args=said,
                )
    for task in (report.evaluation or {}).get("tasks") or []:
        said = {key: task[key] for key in ("n", "stderr") if is_there(task.get(key))}
        yield EvalResult(
            task_type="text-generation",
            dataset_type=_line(task["task"]),
            dataset_name=_line(task["task"]),
            metric_type=_line(task["metric"]),
            metric_value=task["value"],
            metric_args=said or None,
        )


# --- what stands in the card ------------------------------------------------------------------------------------------


def _what(report: Report, name: str, hub: str | None, settings: Json) -> list[str]:
    """One line of what it is, and how much of it was touched."""
    made = f"[{name}](https://huggingface.co/{hub})" if hub else f"the model {escaped(name)}"
    revision = report.recipe.get("revision")
    made += f" at revision {_code(revision)}" if hub and revision else ""
    ways = ", ".join(_code(step["name"]) for step in report.steps)
    line = f"Made from {made} with tersely {escaped(report.versions['tersely'])}" + (f" ({ways})." if ways else ".")
    if base := _base_of_difference(settings):
        line += f" Holds the difference to {escaped(named(base)[0])} alone, and opens together with it."
    rows = {row.name: row for row in report.rows}
    if (row := rows.get("checkpoint")) and row.ratio is not None:
        sizes = " where ".join(format_value(value, row.unit) for value in (row.value, row.before))
        line += f" {sizes} were before, × {row.ratio:.3f}."
    return [line, "", f"{escaped(report.coverage)}."]


def _sizes(report: Report) -> list[str]:
    lines = [
        (row.name, format_value(row.value, row.unit), format_value(row.before, row.unit), row.ratio, row.how)
        for row in report.rows
    ]
    return _section("Size", _table(["", ">now", ">before", ">ratio", "measured as"], lines))


def _quality(report: Report) -> list[str]:

    def figure(text: Json, key: str, unit: str) -> str | None:
        if not is_there(text.get(key)):
            return None
        interval = interval_text(text, key, unit)
        return number_text(text[key], unit) + (f" ({interval})" if interval else "")

    texts, lines, protocols = text_rows(report.evaluation), [], []
    for number, text in enumerate(texts, start=1):
        dense = text.get("dense_perplexity")
        ratio = text["perplexity"] / dense if dense else None
        said = figure({**text, "perplexity_ratio": ratio}, "perplexity_ratio", ".3f")
        figures = [figure(text, "perplexity", "perplexity"), figure(text, "dense_perplexity", "perplexity"), said]
        lines.append(
            [number, place_of(str(text["text"])), *figures, figure(text, "kl", ".4f"), figure(text, "top1", ".4f")]
        )
        protocols.append(f"{number}. {escaped(protocol_text(text))}")
    heads = ["", "text", ">perplexity", ">dense model", ">× dense", ">KL to dense, nats/token", ">same likeliest token"]
    told = _table(heads, lines)
    if told:
        told += [*protocols, "", "In brackets: 95 % intervals over windows.", ""]
    tasks = (report.evaluation or {}).get("tasks") or []
    keys = (("task", ""), ("metric", ""), ("value", ".4f"), ("stderr", ".4f"), ("dense_value", ".4f"), ("floor", ".4f"))
    scores = [[*(_written(task.get(key), unit) for key, unit in keys), task.get("n")] for task in tasks]
    told += _table(["task", "metric", ">value", ">standard error", ">dense model", ">chance", ">questions"], scores)
    if not told:
        told = ["Not measured. `tersely eval FOLDER --against DENSE --card` measures, and writes it here.", ""]
    return _section("Quality", told)


def _errors(report: Report) -> list[str]:
    """Of the outputs, by step and role: as measured, or where nothing was, as predicted."""
    groups: dict[tuple[int, str], list[SiteRow]] = {}
    for site in report.sites:
        groups.setdefault((site.step, site.role), []).append(site)
    lines = []
    for (step, role), sites in groups.items():
        measured = {site.name: site.measured_error for site in sites if site.measured_error is not None}
        predicted = {site.name: site.predicted_error for site in sites if site.predicted_error is not None}
        known = {name: error for name, error in (measured or predicted).items() if is_there(error)}
        if known:
            worst = max(known, key=lambda name: known[name])
            figures = (f"{median(known.values()):.3g}", f"{known[worst]:.3g}", worst)
            method = report.steps[step]["name"] if step < len(report.steps) else sites[0].method
            lines.append((method, role, len(known), "measured" if measured else "predicted", *figures))
    told = _table(["method", "role", ">linears", "as", ">median", ">largest", "where"], lines)
    return _section("Errors", [*told, "Of the energy of an output, the share that is lost.", ""] if told else [])


def _steps(report: Report) -> list[str]:
    """What each of several steps did."""
    if len(report.steps) < 2:
        return []
    texts = [place_of(str(text["text"])) for text in text_rows(report.steps[-1].get("evaluation"))]
    lines = []
    for step in report.steps:
        figures = [number_text(text["perplexity"], "perplexity") for text in text_rows(step.get("evaluation"))]
        lines.append([f"{step['verb']} {step['name']}", format_value(step["bytes"], "bytes"), *figures])
    heads = ["after step", ">weights on disk", *(f">perplexity, {text}" for text in texts)]
    return _section("Steps", _table(heads, lines))


def _left(report: Report) -> list[str]:
    """What nothing was taken from, and why."""
    lines = [f"- Degraded, left dense against the plan: {_code(site)} ({escaped(reason)})"
             for site, reason in report.degraded.items()]  # fmt: skip
    planned = [site.name for site in report.sites if site.amount is None and site.name not in report.degraded]
    if planned:
        lines.append(f"- Dense by the plan: {_some(planned)}")
    reasons: dict[str, list[str]] = {}
    for kept in report.kept:
        reasons.setdefault(str(kept["reason"]), []).append(str(kept["name"]))
    lines += [f"- Kept, {escaped(reason)}: {_some(names)}" for reason, names in reasons.items()]
    return _section("Left dense", [*lines, ""] if lines else [])


def _cautions(report: Report) -> list[str]:
    return _section(
        "Take note", [*(f"- Warning: {escaped(one)}" for one in report.warnings), ""] if report.warnings else []
    )


def _recipe(report: Report) -> list[str]:
    lines = []
    for step in report.recipe.get("step", []):
        said = "; ".join(f"{key} {value}" for key, value in _settings(step))
        lines.append(f"- {escaped(said)}")
    if found := report.calibration:
        sources = ", ".join(place_of(str(source)) for source in found.get("sources") or [])
        windows = f", {found['samples']} windows of {found['length']} tokens" if "samples" in found else ""
        windows += f", {own} of them written by the dense model itself" if (own := found.get("own")) else ""
        lines.append(f"- calibrated on {escaped(sources)}{windows}, sha256 {_code(str(found.get('sha256', ''))[:12])}")
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines.append(f"- seed {report.recipe.get('seed', 0)}; {escaped(versions)}")
    if report.base_sha256:
        lines.append(f"- weights and configuration of the dense model: sha256 {_code(report.base_sha256[:12])}")
    lines += ["", "Every setting is in `recipe.toml`, every site in `plan.json` and `report.json`.", ""]
    return _section("Recipe", lines)


def _settings(step: Json) -> Iterator[tuple[str, str]]:
    """What a step was told, without what it was not."""
    for key, value in step.items():
        if value is None or value is False or value in ([], {}, ["all"]) or (key, value) == ("on_failure", "raise"):
            continue
        if isinstance(value, Mapping):
            yield from _settings(value) if key == "options" else [(key, ", ".join(map(" ".join, _settings(value))))]
        elif isinstance(value, list | tuple):
            yield key, " + ".join(place_of(str(one)) for one in value)
        else:
            yield key, place_of(value) if isinstance(value, str) else str(value)


def _opening(settings: Json) -> list[str]:
    opener = _head(settings)[0]
    lines = [
        "```python",
        "import tersely  # once, so that transformers knows the format; without it, opening fails loudly",
        f"from transformers import {opener}",
        "",
        f'model = {opener}.from_pretrained("this folder, or its name on the hub")',
        "```",
        "",
        "- `tersely verify FOLDER`: are all files as they were written?",
        "- `tersely export FOLDER DEST --to dense`: the stock architecture at full size, for any software, or what has "
        "no counterpart there",
    ]
    if set(_kinds(settings)) == {"quantized"}:
        lines.append(
            "- `tersely export FOLDER DEST --to compressed-tensors`: the same integers for software that reads that "
            "format, or what has no counterpart there"
        )
    if {"sum", "low_rank"} <= set(_kinds(settings)):
        lines.append("- `tersely export FOLDER DEST --to peft`: low-rank updates as an adapter over the dense model")
    return _section("How to open", lines)


# --- parts ------------------------------------------------------------------------------------------------------------


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines] if lines else []


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table in Markdown of plain values; > before a heading sets its column to the right.  A column in which no row
    has anything is left out, and so is a table without rows."""
    cells = [["" if value is None else _written(value, ".3f") or "" for value in row] for row in rows]
    shown = [n for n in range(len(heads)) if any(n < len(row) and row[n] for row in cells)]
    if not shown:
        return []
    right = [heads[n].startswith(">") for n in shown]
    lines = [
        "| " + " | ".join(escaped(heads[n].removeprefix(">")) for n in shown) + " |",
        "|" + "|".join("--:" if is_right else "---" for is_right in right) + "|",
    ]
    for row in cells:
        lines.append("| " + " | ".join(escaped(row[n]) if n < len(row) else "" for n in shown) + " |")
    return [*lines, ""]


def _written(value: object, unit: str) -> str | None:
    if isinstance(value, float):
        return number_text(value, unit) if is_there(value) else None
    return None if value is None else str(value)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(_code, names[:SHOWN])) + more


def _kinds(settings: Json) -> list[str]:
    """Kinds of the modules of a folder, each once."""
    modules = (settings.get("quantization_config") or {}).get("modules") or {}
    return list(dict.fromkeys(str(spec.get("kind")) for spec in modules.values()))


def _base_of_difference(settings: Json) -> str | None:
    """What a folder of differences opens together with."""
    found = (settings.get("quantization_config") or {}).get("base")
    return None if found is None else str(found["model"])


def _head(settings: Json) -> tuple[str, str | None]:
    """The class that opens a folder, and its task on the hub, if it has one there."""
    for name in settings.get("architectures") or []:
        for ending, found in HEADS.items():
            if str(name).endswith(ending):
                return found
        return str(name), None
    return "AutoModelForCausalLM", None
