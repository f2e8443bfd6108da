"""Folders of ours as others read them.

A format is offered only where every module has an exact counterpart in it; otherwise a CheckpointError names those that
have none.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from tersely.checkpoint import Source
from tersely.deltas.folder import open_any
from tersely.destination import check_folder
from tersely.errors import CheckpointError, RecipeError, unknown
from tersely.export.compressed_tensors import write_compressed_tensors
from tersely.export.dense import write_dense
from tersely.export.peft import write_peft

FORMATS: dict[str, Callable[[Source, Path], None]] = {
    "compressed-tensors": write_compressed_tensors,
    "dense": write_dense,
    "peft": write_peft,
}
"""Name → what writes it into a folder that is empty or not there."""


def export(out: Path, destination: Path, to: str, *, trust_remote_code: bool = False) -> None:
    """Write a folder of ours in another format into a new folder.

    Raises RecipeError for a format that is not known, CheckpointError for a folder without a compressed module, for
    what has no counterpart, and for a destination that holds something.
    """
    if to not in FORMATS:
        raise RecipeError(unknown("format", to, FORMATS))
    check_folder(destination)
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} exists; choose another folder or remove it")
    source = open_any(out, trust_remote_code=trust_remote_code)
    if not source.manifest:
        raise CheckpointError(f"{out} holds no compressed module; it is an ordinary model already")
    existed = destination.exists()
    try:
        FORMATS[to](source, destination)
    except BaseException:  # half of a model must not look like one
        shutil.rmtree(destination, ignore_errors=True)
        if existed:
            destination.mkdir(exist_ok=True)
        raise


__all__ = ["FORMATS", "export"]
