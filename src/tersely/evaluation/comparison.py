"""Numbers measured by different protocols are not compared.

A perplexity of 5.12 and one of 5.47 may be one model, read in windows of 4096 and of 2048 tokens; tables that mix the
two have been published.  Two rows are of one protocol where all that the number depends on besides the weights is
equal: the text, how it was cut, joined and averaged, the window, and the dtype.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersely.errors import RecipeError
from tersely.evaluation.protocols import OWN

DECISIVE = ("sha256", "length", "stride", "first_token", "dtype", "windows", "tokens", "definition", "departures")

Row = Mapping[str, Any]


def require_same_protocol(first: Row, second: Row, *, of: str = "") -> None:
    """Raise RecipeError unless two rows of an evaluation were measured by one protocol on one text."""
    names = [row.get("protocol", OWN) for row in (first, second)]
    if names[0] != names[1]:
        raise RecipeError(
            f"{of}protocol {names[0]} and protocol {names[1]}: perplexities of different protocols are different "
            "quantities and are not compared; measure both by one"
        )
    for key in DECISIVE:
        if first.get(key) != second.get(key):
            raise RecipeError(
                f"{of}{key} is {first.get(key)!r} in one and {second.get(key)!r} in the other: numbers of different "
                "protocols are not compared; measure both alike"
            )


def recorded_rows(path: Path) -> list[dict[str, Any]]:
    """The texts of an evaluation that was written as JSON: by ``eval --json``, or into a ``report.json``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path}: no JSON of an evaluation ({error}); give what `eval --json` wrote") from error
    found = content.get("evaluation") or content if isinstance(content, dict) else {}
    rows = found.get("texts")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "perplexity" in row for row in rows):
        raise RecipeError(f"{path}: holds no texts with a perplexity; give what `eval --json` wrote, or a report.json")
    return rows


def recorded_perplexity(row: Row, recorded: Sequence[Row], where: str) -> float:
    """The perplexity that was recorded for the text and protocol of `row`.

    Raises RecipeError where the text was not measured, or by another protocol only, which is then named.
    """
    of_text = [one for one in recorded if one.get("sha256") == row["sha256"]]
    if not of_text:
        raise RecipeError(f"{where} has no perplexity of {row['text']}, sha256 {row['sha256'][:12]}; measure it there")
    refusal: RecipeError | None = None
    for one in of_text:
        try:
            require_same_protocol(row, one, of=f"{row['text']}, here and in {where}: ")
        except RecipeError as error:
            refusal = refusal or error
        else:
            return float(one["perplexity"])
    assert refusal is not None
    raise refusal
