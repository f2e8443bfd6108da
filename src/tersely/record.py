"""What was measured of a finished folder goes into its report, its page and its card.

Three files change and `checksums.json` covers them, yet a kill at any moment leaves a folder that holds what it lists:
first the three are taken off the list, then each is replaced whole, then they are listed again.  A recording that was
stopped is made good by the next one.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tersely.checkpoint import LICENCE_FIELDS
from tersely.destination import check_file
from tersely.errors import CheckpointError
from tersely.journal import commit_text
from tersely.report.card import model_card
from tersely.report.naming import place_of
from tersely.report.page import page
from tersely.report.reading import protocol_of, read_report
from tersely.report.rows import Report, Row, SiteRow
from tersely.verify import CHECKSUMS, verify

Json = Mapping[str, Any]

CARD = "README.md"
RECORDED = (CARD, "report.html", "report.json")
"""Files that tell what was measured."""


def check_recordable(folder: Path) -> None:
    """Raises CheckpointError for a folder that tersely did not write, did not finish, or that was changed since: what
    is measured of it would be recorded beside checksums of something else.  RecipeError where
    nothing may be written."""
    checksums = next(verify(folder))
    if not checksums.passed:
        raise CheckpointError(f"{folder}: {checksums.detail}; what is measured of it is not recorded in it")
    _read_report(folder)
    check_file(folder / CARD, "--card")


def record(folder: Path, figures: Json) -> None:
    """Add figures, as `tersely.evaluate` returns them, to those that the folder has.

    Of a text under the same protocol and of a task that was asked alike the latest figures count; those that they do
    not hold stay.
    """
    report = _read_report(folder)
    report.evaluation = joined(report.evaluation or {}, figures)
    card = folder / CARD
    known = ModelCard.load(card).data if card.is_file() else ModelCardData()
    texts = {
        CARD: model_card(
            report,
            {key: known.get(key) for key in LICENCE_FIELDS},
            json.loads((folder / "config.json").read_text(encoding="utf-8")),
            on_hub=known.get("base_model") is not None,  # a folder that has been moved is no model of the hub
        ),
        "report.html": page(report),
        "report.json": report.to_json(),
    }
    _exchange(folder, texts)


def joined(own: Json, figures: Json) -> dict[str, Any]:
    """Both, without what holds for one machine or for the folder as it was before: the paths of model and texts, and
    the bytes of the folder, which this changes."""
    texts = {protocol_of(text): dict(text) for text in own.get("texts") or []}
    for text in figures.get("texts") or []:
        said = {key: value for key, value in text.items() if key != "dense_recorded_in"}
        texts[protocol_of(text)] = texts.get(protocol_of(text), {}) | said | {"text": place_of(str(text["text"]))}
    tasks = {_asked(task): dict(task) for task in own.get("tasks") or []}
    for task in figures.get("tasks") or []:
        source = {"source": place_of(str(task["source"]))} if task.get("source") else {}
        tasks[_asked(task)] = tasks.get(_asked(task), {}) | dict(task) | source
    found = dict(own) | {key: figures[key] for key in ("parameters", "speed", "samples") if key in figures}
    lists = {"texts": list(texts.values()), "tasks": list(tasks.values())}
    return found | {key: value for key, value in lists.items() if value}


def _asked(task: Json) -> tuple[Any, ...]:
    return task.get("task"), task.get("metric"), task.get("n"), task.get("sha256")


def _read_report(folder: Path) -> Report:
    try:
        plain = read_report(folder)
        rows, sites = ([kind(**row) for row in plain[key]] for kind, key in ((Row, "rows"), (SiteRow, "sites")))
        return Report(**plain | {"rows": rows, "sites": sites})
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'report.json'}: not the report of this release ({error}); nothing can be added to it"
        ) from error


def _exchange(folder: Path, texts: Mapping[str, str]) -> None:
    """Replace files of a folder so that at every moment it holds what it lists."""
    for torn in folder.glob(".*.writing"):  # left by a process that was killed while writing
        torn.unlink()
    listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    others = {name: sha256 for name, sha256 in listed.items() if name not in texts}
    ours = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    _commit_list(folder, others)
    for name, text in texts.items():
        commit_text(folder / name, text)
    _commit_list(folder, others | ours)


def _commit_list(folder: Path, listed: Mapping[str, str]) -> None:
    commit_text(folder / CHECKSUMS, json.dumps(dict(sorted(listed.items())), indent=1) + "\n")
