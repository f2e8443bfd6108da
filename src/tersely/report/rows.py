"""The report of a run: numbers with their unit and how they were measured, bound to what produced them."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One number.  `before` is that of the dense model, where there is one."""

    name: str
    value: float
    unit: str
    how: str
    before: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.value / self.before if self.before else None


@dataclass(frozen=True)
class SiteRow:
    """What became of one linear, or of a unit of several (which has no shape of its own).  Errors are shares of its
    output energy, 0 to 1; None where not known."""

    name: str
    role: str
    out_features: int | None
    in_features: int | None
    step: int
    method: str
    amount: Any
    nbytes: int
    dense_bytes: int
    predicted_error: float | None
    measured_error: float | None
    curve: list[tuple[Any, float]] | None = None
    """What every amount on offer would have cost, by rising amount, as the plan was made from it: of a factorisation
    the tail of the site's spectrum.  Where a factorisation was planned without, the least that any of its rank could
    lose on the inputs it was fitted to.  Else None."""


@dataclass
class Report:
    model: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    coverage: str
    base_sha256: str = ""
    """Checksum of the dense model's weights and configuration."""
    rows: list[Row] = field(default_factory=list)
    sites: list[SiteRow] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Of each step: its verb and name, bytes of the weights on disk after it, seconds, and its evaluation if asked."""
    degraded: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    """Of the whole process, or of the tensors on its CUDA device."""
    peak_bytes_by_stage: dict[str, int] = field(default_factory=dict)
    """The same within each stage that `seconds` tells; empty where the system does not tell."""
    resumed: bool = False
    """Whether the run was stopped and gone on with: seconds and peaks are those since then, of training aside."""

    def to_json(self) -> str:
        text = json.dumps(asdict(self), indent=1)
        # the points of a curve on a line each: a report is read by people, too, and counts among the folder's bytes
        return re.sub(r"\[\n\s*([-+.\de]+),\n\s*([-+.\de]+)\n\s*\]", r"[\1, \2]", text) + "\n"


CURVE_POINTS = 24
"""Of a curve in a report, at most: as many as a plot can show, for every site of a large model."""


def thinned(curve: Sequence[tuple[Any, float]]) -> list[tuple[Any, float]]:
    """At most `CURVE_POINTS` of a curve with its ends, errors with six digits; closest at its beginning, where spectra
    fall."""
    last = len(curve) - 1
    if last < CURVE_POINTS:
        places = list(range(last + 1))
    else:
        places = sorted({round(last * (n / (CURVE_POINTS - 1)) ** 2) for n in range(CURVE_POINTS)})
    return [(curve[place][0], float(f"{curve[place][1]:.6g}")) for place in places]


def size_rows(
    touched: tuple[int, int], weights: int, parameters: tuple[int, int], checkpoint: tuple[int, int]
) -> list[Row]:
    """All readings of a size, each (after, before): bytes of the touched weights, parameters, and the folder's weights.

    `weights`: how many numbers the touched weights stood for.
    """
    rows = []
    if weights:  # a rewrite touches all weights and the size of none
        bits, bits_before = 8 * touched[0] / weights, 8 * touched[1] / weights
        how = "stored numbers of the touched weights, biases aside"
        rows = [
            Row("touched weights", touched[0], "bytes", how, touched[1]),
            Row("bits per touched weight", bits, "bits", "their bytes, over the weights they stand for", bits_before),
        ]
    return [
        *rows,
        Row("parameters", parameters[0], "parameters", "of the whole model, tied ones once", parameters[1]),
        Row("checkpoint", checkpoint[0], "bytes", "safetensors files on disk, headers included", checkpoint[1]),
    ]


def format_value(value: float | None, unit: str) -> str:
    """A number for people: bytes in decimal units, errors with three digits."""
    if value is None:
        return "–"
    if unit == "bytes":
        for factor, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
            if value >= factor:
                return f"{value / factor:.2f} {name}"
        return f"{value:.0f} B"
    if unit == "parameters":
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_amount(amount: Any) -> str:
    """An amount for people: 12, or "rank 8, bits 4"; a dash for what was left dense."""
    if amount is None:
        return "–"
    return ", ".join(f"{key} {value}" for key, value in amount.items()) if isinstance(amount, dict) else str(amount)


def text_rows(evaluation: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
    """The measured texts of an evaluation, if any."""
    return evaluation["texts"] if evaluation else []
