"""Many results on one page: what is on the front, every row, every run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tersely.report import contents, plots
from tersely.report.contents import Inner, Section, there
from tersely.report.naming import PEER, short_text, way
from tersely.report.plots import Arena, arenas, labels, pareto
from tersely.report.reading import Benched, Given, Run
from tersely.report.rendering import render
from tersely.report.tables import Column, Table, facts, number_text, table
from tersely.report.verdict import protocol_text, verdict

NO_RESULT = ("refused", "failed")
"""Keys of a row of a bench, with the reason, in the place of figures."""

NEAR = 1.05
"""How far above the dense perplexity is still near it, as a factor."""


def comparison_page(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one bench as a page."""
    return comparison(Given(benches=(Benched("", rows, {}),)), title)


def comparison(given: Given, title: str | None = None) -> str:
    """HTML of runs and benches side by side."""
    measured = arenas(given)
    sections = [
        Section("front", "Size against quality", plots=there(pareto(given))),
        Section("runs", "Runs", tables=there(_runs(given))),
        *(
            Section(f"text-{number}", label, tables=there(_rows(arena)), lead=_lead(arena))
            for number, (arena, label) in enumerate(zip(measured, labels(measured), strict=True))
        ),
        Section(
            "empty",
            "No result",
            tables=there(_empty(given)),
            lead="Refused: nothing was begun. Failed: numbers that are not finite.",
        ),
        Section("each", "Run by run", runs=[_inner(run, number) for number, run in enumerate(given.runs)]),
        *(_origin(bench, number) for number, bench in enumerate(given.benches)),
    ]
    values = {
        "title": title or _heading(given),
        "sentences": list(_sentences(measured)),
        "degraded": list(_degraded(given)),
    }
    return render("comparison.html.jinja", values, [one for one in sections if not one.is_empty], plots=True)


def _heading(given: Given) -> str:
    models = list(dict.fromkeys(run.model for run in given.runs))
    names = [bench.name.replace("_", " ") for bench in given.benches if bench.name]
    said = " and ".join([*models, *names])
    return f"{said[0].upper()}{said[1:]}, compared" if said else "Compared"


def _sentences(measured: Sequence[Arena]) -> Iterator[str]:
    """What one would take on the first text: the smallest that is nearly as good as dense, and the closest to it."""
    rows = sum(len(arena.rows) for arena in measured)
    for arena in measured[:1]:
        sized = [row for row in arena.rows if row.get("bytes") and not row["way"].startswith(PEER)]
        near = [row for row in sized if arena.dense and row["perplexity"] <= NEAR * arena.dense]
        said = []
        if near:
            within = number_text(NEAR - 1, ".0%")
            said.append(f"the smallest within {within} of the dense perplexity is {_said(min(near, key=_bytes))}")
        closest = min((row for row in sized if row.get("kl") is not None), key=lambda row: row["kl"], default=None)
        if closest is not None:
            said.append(f"the closest to the dense model is {_said(closest)}")
        if said:
            yield f"On {labels(measured)[0]}, {'; '.join(said)}."
    if not rows:
        yield "No quality was measured: give the JSON of `tersely eval` as well, and it is compared."
    else:
        texts = len({arena.text for arena in measured})
        yield f"{rows} results on {texts} {'text' if texts == 1 else 'texts'}, compared under equal protocols only."


def _bytes(row: Mapping[str, Any]) -> float:
    return float(row["bytes"])


def _said(row: Mapping[str, Any]) -> str:
    size = f" at {row['size']}" if row.get("size") else ""
    dense = row.get("dense_perplexity")
    times = f", ×\u00a0{row['perplexity'] / dense:.3f}" if dense else ""
    divergence = f", KL {number_text(row['kl'], '.4f')}" if row.get("kl") is not None else ""
    figures = f"{number_text(row['bytes'], 'bytes')}, perplexity {number_text(row['perplexity'], 'perplexity')}"
    return f"{row['way']}{size} ({figures}{times}{divergence})"


def _degraded(given: Given) -> Iterator[tuple[str, str]]:
    for run in given.runs:
        if run.report.get("degraded"):
            count = len(run.report["degraded"])
            yield run.name, f"{count} {'site was' if count == 1 else 'sites were'} left against the plan"
    said: dict[str, int] = {}
    for bench in given.benches:
        for row in bench.rows:
            if row.get("degraded"):
                size = next((f", {key} {row[key]}" for key in ("keep", "bits") if key in row), "")
                said[way(row["method"], row.get("options") or {}) + size] = row["degraded"]
    for name, count in said.items():
        yield name, f"{count} {'site was' if count == 1 else 'sites were'} left against the plan"


def _lead(arena: Arena) -> str:
    dense = "" if arena.dense is None else f"Dense perplexity {number_text(arena.dense, 'perplexity')}. "
    return f"{dense}Protocol: {protocol_text({**arena.protocol, 'text': None})}."


def _rows(arena: Arena) -> Table | None:
    columns = {
        "way": Column("way"),
        "keep": Column("keep", "number"),
        "bits": Column("bits asked", "number"),
        "bytes": Column("folder", "number", "bytes"),
        "kept": Column("touched, of dense", "number", ".3f"),
        "bits_per_weight": Column("bits/weight", "number", ".2f"),
        "perplexity": Column("perplexity", "number", "perplexity"),
        "times": Column("× dense", "number", ".3f"),
        "kl": Column("KL, nats/token", "number", ".4f"),
        "top1": Column("same likeliest token", "number", ".1%"),
        "left_dense": Column("left dense", "number", "count"),
        "degraded": Column("degraded", "number", "count"),
        "seconds": Column("seconds", "number", ".1f"),
        "extra": Column("memory", "number", "bytes"),
        "trained": Column("trained on"),
    }
    lines = []
    for row in sorted(arena.rows, key=lambda row: float("inf") if row.get("kl") is None else float(row["kl"])):
        dense, peak, resident = (row.get(key) for key in ("dense_perplexity", "peak_bytes", "resident_bytes"))
        derived = {
            "times": row["perplexity"] / dense if dense else None,
            "extra": peak - resident if peak is not None and resident is not None else None,
            "trained": ", ".join(short_text(str(text)) for text in row.get("trained_on") or []),
        }
        lines.append([{**row, **derived}.get(key) for key in columns])
    return table(f"Every result on {arena.text}", list(columns.values()), lines)


def _runs(given: Given) -> Table | None:
    columns = [
        Column("run"),
        Column("method"),
        Column("folder", "number", "bytes"),
        Column("checkpoint, of dense", "number", ".3f"),
        Column("perplexity", "number", "perplexity"),
        Column("× dense", "number", ".3f"),
        Column("KL, nats/token", "number", ".4f"),
        Column("decode, tokens/s", "number", "count"),
        Column("degraded", "number", "count"),
        Column("seconds", "number", ".1f"),
    ]
    lines = []
    for run in given.runs:
        rows = {row["name"]: row for row in run.report.get("rows") or []}
        size = rows.get("checkpoint") or {}
        first: Mapping[str, Any] = next(iter(run.evaluation.get("texts") or []), {})
        dense = first.get("dense_perplexity")
        lines.append(
            [
                run.name,
                run.methods,
                run.nbytes,
                size["value"] / size["before"] if size.get("before") else None,
                first.get("perplexity"),
                first["perplexity"] / dense if dense else None,
                first.get("kl"),
                (run.evaluation.get("speed") or {}).get("decode_tokens_per_second"),
                len(run.report.get("degraded") or {}),
                (run.report.get("seconds") or {}).get("everything"),
            ]
        )
    return table("All runs; quality on the first text of each", columns, lines)


def _empty(given: Given) -> Table | None:
    lines = []
    for bench in given.benches:
        for row in bench.rows:
            for what in NO_RESULT:
                if what in row:
                    lines.append([way(row["method"], row.get("options") or {}), row.get("keep"), what, row[what]])
    return table(
        "Ways without a result", [Column("way"), Column("keep", "number"), Column("what"), Column("why")], lines
    )


def _inner(run: Run, number: int) -> Inner:
    drawn = there(
        plots.amounts(run),
        plots.errors(run),
        plots.spectra(run),
        plots.drift(run),
        plots.stages(run),
        plots.memory(run),
    )
    drawn = [replace(plot, name=f"run{number}-{plot.name}") for plot in drawn]
    tables = there(contents.texts(run), contents.tasks(run), contents.speed(run), contents.sizes(run))
    tables += there(contents.untouched(run), contents.opens(run))
    return Inner(run, verdict(run), tuple(drawn), tuple(tables), tuple(contents.files(run)))


def _origin(bench: Benched, number: int) -> Section:
    content = bench.content
    machine = ", ".join(f"{key} {value}" for key, value in (content.get("machine") or {}).items())
    versions = ", ".join(f"{key} {value}" for key, value in (content.get("versions") or {}).items())
    command = content.get("command")
    return Section(
        f"origin-{number}",
        f"Where {bench.name.replace('_', ' ') or 'it'} comes from",
        facts=facts({"machine": machine, "versions": versions}),
        files=[("The command that makes it anew", str(command))] if command else [],
    )
