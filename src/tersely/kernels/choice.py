"""Which implementation runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_reference = ContextVar("reference", default=False)


@contextmanager
def reference_only() -> Iterator[None]:
    """Within, every operation runs its reference."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def fast_allowed() -> bool:
    return not _reference.get()
