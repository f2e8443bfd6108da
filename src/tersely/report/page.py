"""The report as one HTML file that needs no network: a table of sizes, of quality, and of every site."""

from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from tersely.report.card import named
from tersely.report.rows import Report, format_amount, format_value, text_rows


def page(report: Report) -> str:
    """Self-contained HTML of one run."""
    texts = [text["text"] for text in text_rows(report.evaluation)]
    return render("page.html.jinja", {"report": report, "name": named(report.model)[0], "texts": texts})


def render(template: str, values: dict[str, Any]) -> str:
    """A template of this folder, filled.  All text is escaped: a model may be named anything."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_read)
    )
    environment.filters["quantity"] = format_value
    environment.filters["amount"] = format_amount
    return environment.get_template(template).render(values)


def _read(name: str) -> str:
    return files("tersely.report").joinpath("templates", name).read_text(encoding="utf-8")
