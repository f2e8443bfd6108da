"""Tables for the page: cells that know what they show and what they sort by.

A column in which no row has anything is left out, and so is a table without rows: what was not measured does not
appear, as a zero or a dash would be read as a result.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tersely.report.rows import format_value

How = Literal["text", "code", "number"]


@dataclass(frozen=True)
class Column:
    """A heading and how its values are written.  `unit` is one of `format_value`, or a format such as ``.3f``."""

    name: str
    how: How = "text"
    unit: str = ""


@dataclass(frozen=True)
class Cell:
    """`text` is shown; `value`, where it is a number, is what a click on the heading sorts by."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    name: str
    """Says what it holds to those who cannot see where it stands."""
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def table(name: str, columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> Table | None:
    """A table of plain values, one for each column; None where there is nothing to show."""
    lines = [tuple(row) for row in rows]
    shown = [n for n in range(len(columns)) if any(is_there(line[n]) for line in lines)]
    if not shown:
        return None
    cells = tuple(tuple(cell(columns[n], line[n]) for n in shown) for line in lines)
    return Table(name, tuple(columns[n] for n in shown), cells)


def cell(column: Column, value: Any) -> Cell:
    if not is_there(value):
        return Cell("")
    if column.how != "number" or isinstance(value, str):
        return Cell(str(value))
    number = float(value)
    return Cell(number_text(number, column.unit), number)


def number_text(value: float, unit: str = "") -> str:
    """A number for people; `unit` as in `Column`."""
    if unit.startswith("."):
        return f"{value:{unit}}".replace("%", " %")
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "perplexity":
        return f"{value:.3f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if unit == "" and abs(value) >= 10_000 else format_value(value, unit)


def facts(pairs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of whatever is there."""
    return [(name, str(value)) for name, value in pairs.items() if is_there(value)]


def is_there(value: Any) -> bool:
    """Numbers that are not finite are no measurements."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is not None and value != ""
