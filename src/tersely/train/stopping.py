"""Requests to end that wait for a moment at which there is something to go on from."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, interrupts and requests to end wait; behind it they do what they would have done.  Other threads than the
    main one are sent none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # of a handler that no Python code has set nothing is known by which it could be set again
    ours = {number: handler for number, handler in usual.items() if handler is not None}
    for number in ours:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        for missed in waiting:
            signal.raise_signal(missed)
