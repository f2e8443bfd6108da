"""Pages: one HTML file that needs no network.

The page in a folder of ours (`page`) holds every number, no plot and no script: it counts among the folder's bytes, and
the library that draws weighs two megabytes.  `whole_page` draws, for one run or for many side by side.
"""

from dataclasses import asdict, replace
from pathlib import Path

from tersely.destination import check_file
from tersely.errors import RecipeError
from tersely.report import contents
from tersely.report.comparison import comparison
from tersely.report.reading import Given, Run, read_json, run_of
from tersely.report.rendering import render
from tersely.report.rows import Report
from tersely.report.verdict import verdict

MARK = b'<meta name="generator" content="tersely '
"""By which a page of ours is known."""


def page(report: Report) -> str:
    """HTML of one run, without plots."""
    return run_page(run_of(asdict(report)), plots=False)


def run_page(run: Run, *, plots: bool = True) -> str:
    """HTML of one run."""
    sections = contents.sections(run)
    if not plots:
        sections = [one for one in (replace(section, plots=()) for section in sections) if not one.is_empty]
    values = {"title": f"{run.name}" if run.folder else f"{run.name}, compressed", "run": run, "verdict": verdict(run)}
    return render("page.html.jinja", values, sections, plots=plots)


def whole_page(given: Given, title: str | None = None) -> str:
    """HTML of all that is given: of one run its own page, of several runs or of benches a comparison."""
    if len(given.runs) == 1 and not given.benches:
        return run_page(given.runs[0])
    return comparison(given, title)


def check_place(path: Path) -> None:
    """Raises RecipeError where a page must not be written: over a file that is no page of ours, into a folder whose
    checksums it would break, or where none can be written."""
    check_file(path, "--out")
    sums = path.absolute().parent / "checksums.json"
    if sums.is_file() and path.name in read_json(sums):
        raise RecipeError(f"{path} is a part of that folder, and its checksum is recorded; choose another place")
    if path.exists() and MARK not in path.read_bytes()[:4000]:
        raise RecipeError(f"{path} exists and is no page of tersely; choose another place, or remove it")
