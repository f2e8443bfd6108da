"""Templates filled, and the library that draws."""

import base64
import gzip
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from tersely.report.contents import Section
from tersely.report.plots import Plot


def render(template: str, values: dict[str, Any], sections: Sequence[Section], *, plots: bool) -> str:
    """A template of this folder, filled.  All text is escaped: a model may be named anything."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_read)
    )
    drawn: list[Plot] = [plot for one in sections for plot in one.plots]
    drawn += [plot for one in sections for inner in one.runs for plot in inner.plots]
    common = {
        "version": version("tersely"),
        "sections": sections,
        "plots": [plot.plain() for plot in drawn],
        "packed": packed_plotly() if plots else "",
    }
    return environment.get_template(template).render(common | values)


@cache
def packed_plotly() -> str:
    """The library that draws, as the browser unpacks it: gzip in base64, two fifths of its size."""
    source = files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode("ascii")


def _read(name: str) -> str:
    return files("tersely.report").joinpath("templates", name).read_text(encoding="utf-8")
