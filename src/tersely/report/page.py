"""The report as one HTML file that needs no network: a table of sizes, of quality, and of every site."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from tersely.report.rows import Report, format_value


def page(report: Report) -> str:
    """Self-contained HTML.  All text is escaped: a model may be named anything."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["quantity"] = format_value
    template = environment.from_string(files("tersely.report").joinpath("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(report=report)
