"""Where results are to go: what cannot be written there is known before the work, not after."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tersely.errors import RecipeError


def beside(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.writing")


def check_file(path: Path, flag: str = "") -> None:
    """Raises RecipeError, which begins with the `flag` that named it, where no file can be written, or one would take
    the place of something else.  Writes nothing."""
    said = f"{flag} {path}".lstrip()
    with _reachable(said):
        parent = path.absolute().parent
        above = _standing(parent)
        if not above.is_dir():
            raise RecipeError(f"{said}: {above} is a file; choose another place")
        if above != parent:
            raise RecipeError(f"{said}: no such folder; make it first")
        if path.is_dir():
            raise RecipeError(f"{said} is a folder; name a file in it")
        beside(path).exists()  # fails where its name is too long
        if path.exists() and not path.is_file():
            raise RecipeError(f"{said} is no ordinary file; name another one")
        _check_writable(said, parent)


def check_folder(path: Path, flag: str = "") -> None:
    """Raises RecipeError as `check_file` does, where no folder can be made or written to."""
    said = f"{flag} {path}".lstrip()
    with _reachable(said):
        if path.is_symlink() and not path.exists():
            raise RecipeError(f"{said} is a link to nothing; choose another place")
        above = _standing(path.absolute())
        if not above.is_dir():
            inside = "" if above == path.absolute() else f": {above}"
            raise RecipeError(f"{said}{inside} is a file; choose another place")
        _check_writable(said, above)


def _standing(path: Path) -> Path:
    """The path, or what is there of the way to it."""
    return next(place for place in (path, *path.parents) if place.exists())


def _check_writable(said: str, folder: Path) -> None:
    # a file is written beside its place and renamed, so its own permissions do not count
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecipeError(f"{said}: nothing may be written in {folder}; choose another place, or allow it")


@contextmanager
def _reachable(said: str) -> Iterator[None]:
    """A name too long for the system, or a folder on the way that must not be entered."""
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{said}: {error.strerror}; choose another place") from error
