"""What the process holds, and the most that it held while something ran.

A process has one high-water mark of resident memory, a CUDA device one of what tensors hold.  Two questions are asked
of them.

*How much does this take?* (`peak_within`)  The mark is set back, and read when it is over.  Who sets it back takes it
from everybody else, from whoever watches the process from outside too, so this is for benches, which own theirs.

*Where did it go?* (`peak_of_stage`)  Stages of a run in somebody else's process are measured without touching the mark:
a stage that lifts it has set the record, and the mark is its peak to the page; of any other stage the resident memory
is read again and again, often soon after its beginning, every `SAMPLED_EVERY` seconds later, and the greatest reading
is its peak.  What comes and goes between two readings is missed, so that peak is a lower bound.  Every reading wakes a
thread, which costs the work beside it as much as a change of processes, hence no more of them.

On a CUDA device memory comes and goes far faster than anybody could look, and the mark is set back for every stage;
whoever measures around it is told first what the mark was, and so is `peak_memory`.

Where the system does not tell, nothing is said: None, never zero.
"""

import ctypes
import gc
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SAMPLED_FIRST, SAMPLED_EVERY = 0.01, 0.1
"""Seconds until the first reading of the resident memory, and between two of them later."""


def peak_memory(device: torch.device | None = None) -> int:
    """The most memory held at any moment since the process began, in bytes.

    On a CUDA device: held by tensors there.  On any other, or none: resident memory of the process, in which
    interpreter, libraries and the loading of the model are included; there `peak_within` makes it begin anew.
    """
    if device is not None and device.type == "cuda":
        index = _index(device)
        return max(torch.cuda.max_memory_allocated(device), _forgotten[index])
    own = _resident("VmHWM")
    if own is not None:
        return own
    # also counts what the process held that started this one; not part of Python on Windows
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory(device: torch.device | None = None) -> int | None:
    """Bytes held now: by tensors on a CUDA device, else by the process; None where the system does not tell."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


@dataclass
class Peak:
    """Bytes held when something began, and the most that were held while it ran.  None: the system does not tell."""

    before: int | None = None
    highest: int | None = None


@contextmanager
def peak_within(device: torch.device | None = None) -> Iterator[Peak]:
    """Measure the peak of what runs inside; the figures are there when it has ended.

    On a CUDA device: bytes of tensors there.  On any other, or none: resident memory of the process, which only Linux
    lets one measure anew (its high-water mark is set back through ``/proc/self/clear_refs``); elsewhere both figures
    stay None.  `before` includes all that the process holds anyway: interpreter, libraries, models that are open.
    What was freed but not handed back to the system is handed back first, else it would hide what comes.
    """
    found = Peak()
    if device is not None and device.type == "cuda":
        with _on_cuda(device, found):
            yield found
        return
    _hand_back()
    if _forget_peak():
        found.before = _resident("VmRSS")
    yield found
    if found.before is not None:
        found.highest = _resident("VmHWM")


@contextmanager
def peak_of_stage(device: torch.device | None = None) -> Iterator[Peak]:
    """Measure the peak of what runs inside, next to nothing for the rest of the process; see the head of this file.

    On a CUDA device: bytes of tensors there.  On any other, or none: resident memory of the process, with what earlier
    work left there; both figures stay None where it is not Linux.
    """
    found = Peak()
    if device is not None and device.type == "cuda":
        with _on_cuda(device, found):
            yield found
        return
    found.before = _resident("VmRSS")
    if found.before is None:
        yield found
        return
    record = _resident("VmHWM")
    try:
        with _sampled(found):
            yield found
    finally:
        lifted = _resident("VmHWM")
        if record is not None and lifted is not None and lifted > record:
            found.highest = lifted


@contextmanager
def _sampled(found: Peak) -> Iterator[None]:
    """Keep the greatest of many readings in `found`, the first and the last of them at the ends."""
    ended = threading.Event()
    pages, page = os.open("/proc/self/statm", os.O_RDONLY), os.sysconf("SC_PAGE_SIZE")

    def read() -> None:
        held = int(os.pread(pages, 128, 0).split()[1]) * page
        found.highest = max(found.highest or 0, held)

    def watch() -> None:
        wait = SAMPLED_FIRST
        while not ended.wait(wait):
            read()
            wait = min(1.5 * wait, SAMPLED_EVERY)

    watcher = threading.Thread(target=watch, name="tersely-memory", daemon=True)
    read()
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        read()
        os.close(pages)


# --- a mark that is set back ------------------------------------------------------------------------------------------

# CUDA device → those who measure on it now, and the highest mark that was ever set back: the mark belongs to all of
# the process, and so does the knowledge of what it was.
_measuring: dict[int, list[Peak]] = defaultdict(list)
_forgotten: dict[int, int] = defaultdict(int)


@contextmanager
def _on_cuda(device: torch.device, found: Peak) -> Iterator[None]:
    """Measure from a mark that is set back; whoever measures around it keeps what it was."""
    index = _index(device)
    _tell(index)
    _forgotten[index] = max(_forgotten[index], torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    found.before = torch.cuda.memory_allocated(device)
    _measuring[index].append(found)
    try:
        yield
    finally:
        _tell(index)
        _measuring[index] = [one for one in _measuring[index] if one is not found]


def _tell(index: int) -> None:
    mark = torch.cuda.max_memory_allocated(index)
    for peak in _measuring[index]:
        peak.highest = max(peak.highest or 0, mark)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _hand_back() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries have not
        if trim is not None:
            trim(0)


def _forget_peak() -> bool:
    """Set the high-water mark back to what is resident now; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(what: str) -> int | None:
    """A line of /proc/self/status, in bytes; None where there is no such file, or no such line in it."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:")), None)
