"""Units of work that survive a kill.

A file appears under its name complete or not at all: it is written beside it, synced, then renamed.  A run keeps its
units (curves, statistics, finished blocks) in a folder inside the output until it ends; a run of the same recipe that
finds them goes on where the former one stopped, and ends with the same bytes.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersely.errors import CheckpointError

FOLDER = ".tersely"


def commit(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, sync it, and rename it to `path`; readable as the umask says."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode  # some writers create their files readable by the owner alone
    write(temporary)
    temporary.chmod(mode)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def commit_text(path: Path, text: str) -> None:
    commit(path, lambda temporary: temporary.write_bytes(text.encode()))


def commit_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Safetensors as transformers writes them, so that saving again through it gives the same bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    commit(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped into memory rather than read."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


class Journal:
    """The units of one unfinished run, in a folder of its own inside the output."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.folder = out / FOLDER
        self._fingerprint = fingerprint
        self._stale = False
        self.renamed = self.folder / f"source-{fingerprint[:16]}"
        """For the weights under the modules' names; of this run alone, since a path may come to hold another model."""

    def begin(self) -> bool:
        """Start, or go on with, a run; True if there was one.  Raises CheckpointError where `out` is something else."""
        if self._stale:
            for path in [*self.folder.parent.iterdir(), *self.folder.iterdir()]:
                if path not in (self.folder, self.renamed):
                    _remove(path)
            self._stale = False
        started = self.folder / "run.json"
        if started.exists():
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        commit_text(started, json.dumps({"fingerprint": self._fingerprint}))
        return False

    def check(self, *, fresh: bool = False) -> None:
        """Refuse an output that is neither new nor an unfinished run of the same recipe.  Writes nothing; with
        `fresh` an unfinished run of whatever recipe is forgotten once this one begins."""
        out = self.folder.parent
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        started = self.folder / "run.json"
        if not started.is_file():
            if out.is_dir() and [path.name for path in out.iterdir()] == [FOLDER]:
                return  # stopped before the run began, while the checkpoint was being renamed
            raise CheckpointError(f"{out} exists and holds no unfinished run; choose another folder or remove it")
        if fresh:
            self._stale = True
        elif json.loads(started.read_text())["fingerprint"] != self._fingerprint:
            raise CheckpointError(
                f"{out} holds an unfinished run of another recipe; go on with that one, choose another folder, "
                "or start over with --fresh"
            )

    def has(self, unit: str) -> bool:
        return (self.folder / unit).exists()

    def write_json(self, unit: str, value: Any) -> None:
        commit_text(self._place(unit), json.dumps(value))

    def read_json(self, unit: str) -> Any:
        return json.loads((self.folder / unit).read_text())

    def write_tensors(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        commit_tensors(self._place(unit), tensors)

    def read_tensors(self, unit: str) -> dict[str, Tensor]:
        return read_tensors(self.folder / unit)

    def finish(self) -> None:
        """The output is complete: forget the units."""
        for torn in self.folder.parent.glob(".*.writing"):  # left by a process that was killed while writing
            torn.unlink()
        _sync_folder(self.folder.parent)
        for path in self.folder.iterdir():
            if path.name != "run.json":  # what says that the run is unfinished goes last
                _remove(path)
        shutil.rmtree(self.folder)

    def _place(self, unit: str) -> Path:
        path = self.folder / unit
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make renames durable, where the system lets a folder be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
