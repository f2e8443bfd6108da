"""What the page draws, as plain data: the browser gives it colours, so that it follows light and dark.

A plot has views, of which one is shown at a time: the text, the axes, the projection.  Every view carries the sentence
that says what is to be seen in it, for those who cannot see it.  Nothing is drawn from numbers that are not finite.

*Front.*  Of points (bytes, loss) those are on the front that no other point beats in one and equals in the other.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import median
from typing import Any, TypeGuard

from tersely.report.naming import short_text, way
from tersely.report.reading import Given, Json, Run, protocol_of
from tersely.report.rows import format_value
from tersely.report.tables import is_there, number_text

View = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    name: str
    """Unlike that of any other plot of the page; letters and dashes."""
    kind: str
    """Which function of ``page.js`` draws it."""
    title: str
    views: list[View]
    """Each with `choice`, one entry for each of `selectors`, and `alt`."""
    note: str = ""
    selectors: list[str] = field(default_factory=list)
    data: Any = None
    """What all views share."""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


# --- the front --------------------------------------------------------------------------------------------------------

ACROSS = {
    "bytes": "bytes of the folder",
    "touched_bytes": "bytes of the touched weights",
    "bits_per_weight": "bits per weight",
}
UP = {"kl": "KL to dense, nats per token", "perplexity": "perplexity"}
ALL = "everything"
COMPARABLE = 1e-3
"""Dense perplexities that differ by less, relatively, are those of one model."""


@dataclass(frozen=True)
class Arena:
    """Rows that may be compared: one model, one text, one protocol, one group."""

    text: str
    group: str
    protocol: Json
    """A row that holds it."""
    dense: float | None
    rows: list[dict[str, Any]]


def arenas(given: Given) -> list[Arena]:
    """Everything that was measured, by what it may be compared with."""
    found: list[Arena] = []
    for row in [*_bench_rows(given), *_run_rows(given)]:
        dense = row.get("dense_perplexity")
        for arena in found:
            same = arena.group == row["group"] and protocol_of(arena.protocol) == protocol_of(row)
            if same and _of_one_model(arena.dense, dense):
                arena.rows.append(row)
                break
        else:
            found.append(Arena(short_text(str(row["text"])), row["group"], row, dense, [row]))
    return found


def labels(found: Sequence[Arena]) -> list[str]:
    """What to call arenas beside each other: the text, and as much more as tells them apart."""
    tried = [[arena.text] for arena in found]
    for more in ("group", "length", "dense"):
        names = [", ".join(words) for words in tried]
        for arena, words, name in zip(found, tried, names, strict=True):
            if names.count(name) > 1:
                inner = arena.protocol.get("protocol")
                length = (inner if isinstance(inner, Mapping) else arena.protocol).get("length")
                dense = f"dense {arena.dense:.4g}" if arena.dense else "no dense model"
                words.append({"group": arena.group, "length": f"{length} tokens", "dense": dense}[more])
    return [", ".join(words) for words in tried]


def _of_one_model(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return abs(first / second - 1) < COMPARABLE


def _bench_rows(given: Given) -> Iterator[dict[str, Any]]:
    for bench in given.benches:
        for row in bench.rows:
            if row.get("perplexity") is None:
                continue
            group = row.get("group") or ("trained" if row.get("trained_on") else "untrained")
            size = next((f"{key} {row[key]}" for key in ("keep", "bits") if row.get(key) is not None), "")
            said = way(row["method"], row.get("options") or {})
            source = bench.name.replace("_", " ")
            yield {**row, "source": source, "group": group, "way": said, "size": size}


def _run_rows(given: Given) -> Iterator[dict[str, Any]]:
    for run in given.runs:
        sizes = {row["name"]: row["value"] for row in run.report.get("rows") or []}
        steps = (run.report.get("recipe") or {}).get("step") or []
        trained = any("train" in step or step.get("refine") is not None for step in steps)
        for text in run.evaluation.get("texts") or []:
            yield {
                **text,
                "source": "runs",
                "group": "trained" if trained else "untrained",
                "way": run.name,
                "method": run.name,
                "size": "",
                "bytes": run.nbytes,
                "touched_bytes": sizes.get("touched weights"),
                "bits_per_weight": sizes.get("bits per touched weight"),
                "seconds": (run.report.get("seconds") or {}).get("everything"),
            }


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points on the front, by rising first coordinate; both are better when smaller."""
    order = sorted(range(len(points)), key=lambda n: points[n])
    best, kept = math.inf, []
    for number in order:
        if points[number][1] < best:
            best = points[number][1]
            kept.append(number)
    return kept


def pareto(given: Given) -> Plot | None:
    """Bytes against loss, for every text; None where there are not two points to compare."""
    shown = [arena for arena in arenas(given) if len(arena.rows) > 1]
    views, data = [], []
    for number, (arena, label) in enumerate(zip(shown, labels(shown), strict=True)):
        keys = ("way", "size", "method", *ACROSS, *UP)
        rows = [{key: row[key] for key in keys if is_there(row.get(key))} for row in arena.rows]
        data.append({"label": label, "dense": arena.dense, "rows": rows})
        sources = list(dict.fromkeys(row["source"] for row in arena.rows))
        for among in [ALL, *sources] if len(sources) > 1 else [ALL]:
            own = [n for n, row in enumerate(arena.rows) if among in (ALL, row["source"])]
            for up, across in product(UP, ACROSS):
                points = [n for n in own if _drawable(rows[n].get(across)) and _drawable(rows[n].get(up))]
                if len(points) > 1:
                    views.append(_front_view(number, label, among, rows, points, up, across))
    if not views:
        return None
    note = "The line joins results that nothing here beats in both size and quality. Lower left is better."
    return Plot("front", "pareto", "Size against quality", views, note, ["text", "among", "quality", "size"], data)


def _front_view(
    number: int, label: str, among: str, rows: Sequence[Json], points: Sequence[int], up: str, across: str
) -> View:
    kept = [points[n] for n in front([(rows[n][across], rows[n][up]) for n in points])]
    ends = [
        f"{_named(rows[n])} at {number_text(rows[n][across], _unit(across))} and {number_text(rows[n][up], _unit(up))}"
        for n in dict.fromkeys((kept[0], kept[-1]))
    ]
    alt = f"{UP[up]} against {ACROSS[across]} on {label}: {len(kept)} of {len(points)} results are on the front, " + (
        f"from {ends[0]} to {ends[-1]}." if len(ends) > 1 else f"{ends[0]}."
    )
    choice = [label, among, UP[up], ACROSS[across]]
    return {"choice": choice, "alt": alt, "of": number, "x": across, "y": up, "points": points, "front": kept}


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['way']}, {row['size']}" if row.get("size") else str(row["way"])


def _unit(key: str) -> str:
    return {"bytes": "bytes", "touched_bytes": "bytes", "kl": ".4f", "perplexity": "perplexity"}.get(key, ".3f")


def _drawable(value: Any) -> TypeGuard[int | float]:
    """Axes are logarithmic."""
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


# --- sites ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A site by block and projection."""

    site: Json
    layer: int
    projection: str


def placed(sites: Iterable[Json]) -> list[Placed]:
    """Sites that lie in a block.  The projection is the role, or the path in the block where several have one role."""
    found = []
    for site in sites:
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site["name"])
        if match:
            found.append((site, int(match[1]), site["name"][match.end() :]))
    roles = [(layer, site.get("role")) for site, layer, _ in found]
    unique = len(set(roles)) == len(roles)
    return [
        Placed(site, layer, str(site["role"]) if site.get("role") and (unique or not path) else path)
        for site, layer, path in found
    ]


def amounts(run: Run) -> Plot | None:
    """What became of every site: rank or bits, and the share of bytes that was kept."""
    views = []
    for label, sites in _by_step(run):
        for name, unit, values in _amount_views(sites):
            views += _heat(sites, values, [label, name], unit, "sequential", "amount", "dense")
    note = "An empty cell was left dense."
    return Plot("amounts", "heat", "What was kept where", views, note, ["step", "shown"]) if views else None


def errors(run: Run) -> Plot | None:
    """What every site lost, as the plan foresaw it and as it was measured."""
    views = []
    for label, sites in _by_step(run):
        cut = [site.site if site.site.get("amount") is not None else {} for site in sites]
        predicted, measured = ([site.get(f"{how}_error") for site in cut] for how in ("predicted", "measured"))
        ratios = [m / p if _drawable(p) and _drawable(m) else None for p, m in zip(predicted, measured, strict=True)]
        views += _heat(
            sites, measured, [label, "measured error"], ".3g", "sequential", "error", "left dense, or not known"
        )
        views += _heat(
            sites, predicted, [label, "predicted error"], ".3g", "sequential", "error", "left dense, or not known"
        )
        views += _heat(
            sites, ratios, [label, "measured ÷ predicted"], ".3g", "diverging", "ratio", "left dense, or not known"
        )
    note = "Errors are shares of a site's output energy, 0 to 1, on calibration inputs."
    return Plot("errors", "heat", "What was lost where", views, note, ["step", "shown"]) if views else None


def _by_step(run: Run) -> Iterator[tuple[str, list[Placed]]]:
    sites = run.report.get("sites") or []
    for step in sorted({site.get("step", 0) for site in sites}):
        of_step = [site for site in sites if site.get("step", 0) == step]
        yield f"{step + 1}: {of_step[0].get('method', '')}", placed(of_step)


def _amount_views(sites: Sequence[Placed]) -> Iterator[tuple[str, str, list[float | None]]]:
    """(name, unit, a value for each site)."""
    given = [site.site.get("amount") for site in sites]
    if any(_is_number(amount) for amount in given):
        yield _amount_name(sites), ".4g", [float(a) if _is_number(a) else None for a in given]
    for key in dict.fromkeys(key for amount in given if isinstance(amount, Mapping) for key in amount):
        values = [amount.get(key) if isinstance(amount, Mapping) else None for amount in given]
        if any(_is_number(value) for value in values):
            yield str(key), ".4g", [float(v) if _is_number(v) else None for v in values]
    left = [site.site.get("amount") is None for site in sites]
    shares = [s.site["nbytes"] / s.site["dense_bytes"] if s.site.get("dense_bytes") else None for s in sites]
    yield "share of bytes kept", ".3f", [None if dense else share for share, dense in zip(shares, left, strict=True)]
    yield "bits per weight", ".3f", [None if d else _bits(s.site) for s, d in zip(sites, left, strict=True)]


def _amount_name(sites: Sequence[Placed]) -> str:
    """Rank, where the bytes are those of two factors; else bits, where they are those of codes."""
    cut = [site.site for site in sites if _is_number(site.site.get("amount")) and site.site.get("out_features")]
    factors = {s["nbytes"] / (s["amount"] * (s["out_features"] + s["in_features"])) for s in cut if s["amount"]}
    if factors and factors <= {1.0, 2.0, 4.0}:
        return "rank"
    bits = [(_bits(site), site["amount"]) for site in cut]
    return "bits" if bits and all(b is not None and a <= b < a + 2 for b, a in bits) else "amount"


def _bits(site: Json) -> float | None:
    weights = (site.get("out_features") or 0) * (site.get("in_features") or 0)
    return 8 * site["nbytes"] / weights if weights else None


def _heat(
    sites: Sequence[Placed], values: Sequence[Any], choice: list[str], unit: str, scale: str, what: str, empty: str
) -> list[View]:
    """A view, in a list; none where there is nothing to see."""
    known = [(v, s) for v, s in zip(values, sites, strict=True) if _is_number(v) and math.isfinite(v)]
    if not known:
        return []
    layers = sorted({site.layer for site in sites})
    projections = list(dict.fromkeys(site.projection for site in sites))
    grid: list[list[float | None]] = [[None] * len(layers) for _ in projections]
    columns, lines = {layer: n for n, layer in enumerate(layers)}, {p: n for n, p in enumerate(projections)}
    for value, site in known:
        grid[lines[site.projection]][columns[site.layer]] = _rounded(value)
    low, high = min(known, key=lambda pair: pair[0]), max(known, key=lambda pair: pair[0])
    alt = (
        f"{choice[-1]}, {len(layers)} layers by {len(projections)} projections: from {number_text(low[0], unit)} "
        f"(layer {low[1].layer}, {low[1].projection}) to {number_text(high[0], unit)} (layer {high[1].layer}, "
        f"{high[1].projection}), median {number_text(median(value for value, _ in known), unit)}."
    )
    return [
        {
            "choice": choice,
            "alt": alt,
            "x": layers,
            "y": projections,
            "z": grid,
            "unit": unit,
            "scale": scale,
            "what": what,
            "empty": empty,
        }
    ]


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: float) -> float:
    """Six digits are more than a screen can show."""
    return float(f"{value:.6g}")


# --- spectra, drift, time ---------------------------------------------------------------------------------------------


def spectra(run: Run) -> Plot | None:
    """What each amount would have cost every site, and which one was taken."""
    views = []
    for label, sites in _by_step(run):
        for projection in dict.fromkeys(site.projection for site in sites):
            lines = [_line(site) for site in sites if site.projection == projection and site.site.get("curve")]
            if not lines:
                continue
            cuts = [line["cut"][0] for line in lines if line["cut"]]
            alt = (
                f"Error left by every {_amount_name(sites)} in {projection}, one line for each of {len(lines)} layers; "
                + (f"{_between(cuts)}, {len(cuts)} of them." if cuts else "none is cut.")
            )
            views.append({"choice": [label, projection], "alt": alt, "lines": lines, "across": _amount_name(sites)})
    note = (
        "A line is one layer's spectrum: the share of output energy that is lost if only so much is kept. The dot is "
        "where it was cut, at the loss that was predicted, or else measured; a line without one was left dense."
    )
    return Plot("spectra", "spectra", "Spectra and cuts", views, note, ["step", "projection"]) if views else None


def _between(cuts: Sequence[float]) -> str:
    least, most = min(cuts), max(cuts)
    return f"cut at {least:g}" if least == most else f"cut between {least:g} and {most:g}"


def _line(place: Placed) -> View:
    points = sorted((x, y) for x, y in place.site["curve"] if _is_number(x) and _is_number(y) and math.isfinite(y))
    amount, lost = place.site.get("amount"), place.site.get("predicted_error")
    if lost is None:
        lost = place.site.get("measured_error")
    return {
        "layer": place.layer,
        "x": [amount for amount, _ in points],
        "y": [_rounded(share) for _, share in points],
        "cut": [amount, _rounded(lost)] if _is_number(amount) and _is_number(lost) else None,
    }


def drift(run: Run) -> Plot | None:
    """How far hidden states have moved from the dense model's, block by block."""
    views = []
    whole = [{"text": "", "drift": run.evaluation.get("drift")}]
    for text in [*(run.evaluation.get("texts") or []), *whole]:
        found = [point for point in text.get("drift") or [] if isinstance(point, Mapping)]
        label = short_text(str(text["text"]))
        for key, name in (("relative_error", "relative distance"), ("cosine", "cosine")):
            values = [value for point in found if _is_number(value := point.get(key))]
            if not values or len(values) < len(found):
                continue
            alt = (
                f"Drift by depth{f' on {label}' if label else ''}, {name}: {number_text(values[0], '.3g')} behind the "
                f"first of {len(values)} blocks, {number_text(values[-1], '.3g')} behind the last."
            )
            blocks = [point.get("block", number) for number, point in enumerate(found)]
            views.append({"choice": [label, name], "alt": alt, "x": blocks, "y": [_rounded(v) for v in values]})
    note = "Hidden states behind each block against the dense model's, relative to their size."
    return Plot("drift", "drift", "Drift by depth", views, note, ["text", "shown"]) if views else None


def stages(run: Run) -> Plot | None:
    """Where the seconds went."""
    seconds = {k: v for k, v in (run.report.get("seconds") or {}).items() if k != "everything" and _is_number(v)}
    if not seconds:
        return None
    whole = (run.report.get("seconds") or {}).get("everything")
    rest = whole - sum(seconds.values()) if _is_number(whole) else 0
    if rest > 0.005 * (whole or 1):
        seconds["the rest"] = rest
    ranked = dict(sorted(seconds.items(), key=lambda pair: -pair[1]))
    first, spent = next(iter(ranked.items()))
    alt = f"{len(ranked)} stages; the longest is {first} with {spent:.3g} s of {sum(ranked.values()):.3g} s."
    view = {"choice": [], "alt": alt, "names": list(ranked), "seconds": [_rounded(v) for v in ranked.values()]}
    note = "The rest: opening, evaluating, writing." if "the rest" in ranked else ""
    if "evaluate" in ranked:
        note = note.replace(" evaluating,", "")
    return Plot("stages", "bars", "Where the time went", [view], note)


def memory(run: Run) -> Plot | None:
    """The most that was held in each stage, in the order of `stages`."""
    peaks = {k: v for k, v in (run.report.get("peak_bytes_by_stage") or {}).items() if _is_number(v) and v > 0}
    if not peaks:
        return None
    seconds = run.report.get("seconds") or {}
    ranked = sorted(peaks, key=lambda stage: -seconds.get(stage, 0.0))
    most = max(ranked, key=lambda stage: peaks[stage])
    whole = run.report.get("peak_bytes")
    ever = f"; at any moment, {format_value(whole, 'bytes')}" if _is_number(whole) else ""
    alt = f"Peak memory of {len(ranked)} stages; the most is {format_value(peaks[most], 'bytes')}, in {most}{ever}."
    held = held_by(run)
    note = f"{held[0].upper()}{held[1:]}, at the worst moment of each stage."
    view = {"choice": [], "alt": alt, "names": ranked, "bytes": [peaks[stage] for stage in ranked]}
    return Plot("memory", "bars", "Peak memory", [view], note)


def held_by(run: Run) -> str:
    """What the peaks of a run are peaks of."""
    on_gpu = str((run.report.get("recipe") or {}).get("device", "")).startswith("cuda")
    return "tensors on the GPU" if on_gpu else "resident memory of the process"
