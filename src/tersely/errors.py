"""What can go wrong, in a few words.

Every message says what came, what was wanted and what to do.  The command line turns these into one line and an exit
status: 2 while nothing has been written, 1 once a run has begun (it can then be resumed).
"""

import difflib
from collections.abc import Iterable


class TerselyError(Exception):
    """Base of all errors that tersely raises on purpose."""


class RecipeError(TerselyError):
    """The request is wrong: an unknown name, a contradiction, a value out of range, a text that cannot be read."""


class AnatomyError(TerselyError):
    """The model is not understood: an unknown family, a target that names nothing."""


class NumericalError(TerselyError):
    """A number is not finite, or a result that mathematics promises did not appear."""


class CheckpointError(TerselyError):
    """A folder cannot be read or written as a checkpoint."""


class DamageError(CheckpointError):
    """What an unfinished run has left cannot be read: it has to start over."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a table: the nearest known name first, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}known: {', '.join(names)}"
