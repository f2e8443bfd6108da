"""Units of work that survive a kill.

A file appears under its name complete or not at all: it is written beside it, synced, then renamed.  A run keeps its
units (curves, statistics, finished blocks) in a folder inside the output until it ends; a run of the same recipe that
finds them goes on where the former one stopped, and ends with the same bytes.  While it works, a lock in that folder
keeps other runs out; the system takes it off a process that dies.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersely.destination import beside
from tersely.errors import CheckpointError, DamageError

try:
    import fcntl
except ImportError:  # a platform without such locks: runs are not kept apart there
    fcntl = None  # type: ignore[assignment]

FOLDER, STARTED, LOCK = ".tersely", "run.json", "lock"
DONE = f"{FOLDER}.done"


def commit(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, sync it, and rename it to `path`; readable as the umask says."""
    temporary = beside(path)
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


@contextmanager
def reading(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Within, `path` is read, which a run wrote.  Raises DamageError if that fails; CheckpointError for a file `shared`
    by several runs, since those need not start over."""
    try:
        yield
    except (CheckpointError, SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        found = f"{path}: damaged ({str(error).strip().partition(chr(10))[0]})"
        if shared:
            raise CheckpointError(f"{found}; remove it, what it held is measured again") from error
        raise DamageError(f"{found}; nothing can go on from it, start over with --fresh") from error


class Journal:
    """The units of one unfinished run, in a folder of its own inside the output."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.folder = out / FOLDER
        self._fingerprint = fingerprint
        self._weights: str | None = None
        self._stale = False
        self._lock: IO[bytes] | None = None
        self.renamed = self.folder / f"source-{fingerprint[:16]}"
        """For the weights under the modules' names; of this run alone, since a path may come to hold another model."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other process works in the output; within itself it changes nothing.  Raises CheckpointError,
        with everything as it was, where one does already.

        Of the processes of one run (`torchrun`) the first holds the lock for all.
        """
        if self._lock is not None or not _locks():
            yield
            return
        with locked(self.folder / LOCK, self._occupied()) as file:
            self._lock = file
            try:
                self._check_again()
                yield
            finally:
                self._lock = None

    def begin(self) -> bool:
        """Start, or go on with, a run; True if there was one.  Raises CheckpointError where `out` is something else."""
        started = self.folder / STARTED
        if self._stale:
            # stopped from here on, nothing goes on from what is left
            commit_text(started, json.dumps({"fingerprint": "", "weights": None}))
            for path in [*self.folder.parent.iterdir(), *self.folder.iterdir()]:
                if path not in (self.folder, self.renamed, self.folder / LOCK, started):
                    _remove(path)
            started.unlink()
            self._stale = False
        if started.exists():
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        commit_text(started, json.dumps({"fingerprint": self._fingerprint, "weights": self._weights}))
        return False

    def check(self, *, fresh: bool = False) -> None:
        """Refuse an output that is neither new nor an unfinished run of the same recipe, or in which a run is at work.
        Writes nothing; with `fresh` an unfinished run of whatever recipe is forgotten once this one begins."""
        out = self.folder.parent
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if self._lock is None and _locks() and (self.folder / LOCK).is_file():
            with (self.folder / LOCK).open("rb+") as file:
                if not _taken(file):
                    raise self._occupied()
        if not (self.folder / STARTED).is_file():
            if out.is_dir() and [path.name for path in out.iterdir()] == [FOLDER]:
                return  # stopped before the run began, while the checkpoint was being renamed
            shutil.rmtree(out / DONE, ignore_errors=True)  # its run was killed when all else was done
            raise CheckpointError(f"{out} exists and holds no unfinished run; choose another folder or remove it")
        self._stale = fresh
        self._compare("fingerprint", self._fingerprint)

    def check_weights(self, digest: str) -> None:
        """Refuse to go on with other weights than those that the run began with, which only the `digest` of all of them
        may tell."""
        self._weights = digest
        if (self.folder / STARTED).is_file():
            self._compare("weights", digest)

    def _compare(self, what: str, ours: str) -> None:
        if self._stale:
            return
        started = self.folder / STARTED
        with reading(started):
            theirs = json.loads(started.read_text(encoding="utf-8"))[what]
        if theirs != ours:
            raise CheckpointError(
                f"{self.folder.parent} holds an unfinished run of another recipe, model or text; go on with that one, "
                "choose another folder, or start over with --fresh"
            )

    def _check_again(self) -> None:
        """What was checked may have changed until the lock was taken."""
        try:
            self.check(fresh=self._stale)
            if self._weights is not None:
                self.check_weights(self._weights)
        except CheckpointError:
            if [path.name for path in self.folder.iterdir()] == [LOCK]:  # made for the lock alone
                shutil.rmtree(self.folder)
            raise

    def _occupied(self) -> CheckpointError:
        out = self.folder.parent
        return CheckpointError(
            f"{out}: another run is at work in it; let that one end, stop it, or choose another folder"
        )

    def has(self, unit: str) -> bool:
        return (self.folder / unit).exists()

    def write_json(self, unit: str, value: Any) -> None:
        commit_text(self._place(unit), json.dumps(value))

    def read_json(self, unit: str) -> Any:
        with reading(self.folder / unit):
            return json.loads((self.folder / unit).read_text(encoding="utf-8"))

    def write_tensors(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        commit_tensors(self._place(unit), tensors)

    def read_tensors(self, unit: str) -> dict[str, Tensor]:
        with reading(self.folder / unit):
            return read_tensors(self.folder / unit)

    def finish(self) -> None:
        """The output is complete: forget the units."""
        for torn in self.folder.parent.glob(".*.writing"):  # left by a process that was killed while writing
            torn.unlink()
        _sync_folder(self.folder.parent)
        for path in self.folder.iterdir():
            if path.name not in (STARTED, LOCK):  # what says that the run is unfinished goes last
                _remove(path)
        gone = self.folder.with_name(DONE)  # in one stroke, so that nobody meets a half of it
        self.folder.rename(gone)
        if self._lock is not None:
            self._lock.close()  # some network file systems keep the folder of an open file
        shutil.rmtree(gone)

    def _place(self, unit: str) -> Path:
        path = self.folder / unit
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def locked(lock: Path, occupied: Exception) -> Iterator[IO[bytes]]:
    """Within, no other process holds the lock of that name; where one does, `occupied` is raised."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        # whoever ended in between took its lock away: then another file than ours bears the name, or none
        if not _taken(file) or not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            raise occupied
        yield file


def clear_unbegun(out: Path, *, keep: bool = False) -> None:
    """Remove an output in which no run has begun, but for the folder itself if it is to be kept: if anything, weights
    were renamed there in vain."""
    inside = [path.name for path in out.iterdir()] if out.is_dir() else []
    if inside == [FOLDER] and not any((out / FOLDER / name).exists() for name in (STARTED, LOCK)):
        shutil.rmtree(out / FOLDER if keep else out)


def _locks() -> bool:
    """Whether this process has to take the lock of a run."""
    return fcntl is not None and os.environ.get("RANK", "0") == "0"


def _taken(file: IO[bytes]) -> bool:
    """Take the lock on a file, which lasts until the file is closed; False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        return True
    return True


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
