"""Many results on one HTML page that needs no network."""

from collections.abc import Sequence
from typing import Any

from tersely.report.page import render


def comparison_page(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table of bench rows, grouped by text."""
    texts = dict.fromkeys(row["text"] for row in rows)
    groups = [(text, [row for row in rows if row["text"] == text]) for text in texts]
    return render("comparison.html.jinja", {"title": title, "groups": groups})
