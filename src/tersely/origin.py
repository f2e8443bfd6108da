"""The dense model that a folder was made from, found again."""

from collections.abc import Iterator
from pathlib import Path

from tersely.checkpoint import open_source
from tersely.errors import TerselyError
from tersely.recipe import read_recipe
from tersely.report.reading import read_report


def dense_model(folder: Path) -> tuple[Path | None, str]:
    """Where the dense model of a compressed folder lies, if it still is the same, and a line that says so or why not.

    None and an empty line for a folder that records no origin.  Raises RecipeError and CheckpointError for records that
    are damaged.
    """
    records = [folder / "recipe.toml", folder / "report.json"]
    absent = [record.name for record in records if not record.is_file()]
    if len(absent) == len(records):
        return None, ""
    if absent:
        return None, _without(f"{folder} has no {absent[0]}, which would tell it")
    asked, wanted = read_recipe(records[0]), read_report(folder).get("base_sha256")
    why = f"it was made from {asked.model}, which is no folder, seen from here or from {folder}"
    for place in _places(folder, asked.model):
        try:
            found = open_source(place, dtype=asked.dtype).check_weights()
        except TerselyError as error:
            why = f"it was made from {asked.model}, which cannot be compared with ({error})"
            continue
        if found == wanted:
            return place, f"beside the dense model it was made from: {place}"
        why = f"it was made from {asked.model}, and {place} is another model now"
    return None, _without(why)


def _places(folder: Path, model: str) -> Iterator[Path]:
    """Folders that the recorded name of a model may mean.

    It is recorded as it was given: made absolute it would break when both folders are moved together, and tell whoever
    gets the result where on the disk it was made.  A relative one was relative to a place that is not recorded, mostly
    one above the result, so all these are tried; the checksum tells whether it is the right one.
    """
    named = Path(model).expanduser()
    candidates = [named, *(above / named for above in (folder.resolve(), *folder.resolve().parents))]
    seen = set()
    for place in candidates:
        if place.is_dir() and place.resolve() not in seen:
            seen.add(place.resolve())
            yield place


def _without(why: str) -> str:
    return f"not compared with the dense model: {why}; say where it is with --against"
