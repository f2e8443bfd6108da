"""C++ beside the package, compiled on first use.

A source has a plain C interface and includes nothing but `lanes.h` and the standard library, so that it takes a second
or two; it is called on the addresses of tensors.  What was built is kept below the user's cache folder under a hash of
the source, the compiler, its flags and what the processor can do, since code is made for the processor at hand.

Without a compiler, or where it fails, the references run, and one line says so.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
)
FOR_THIS_PROCESSOR = "-march=native"
HEADER = "lanes.h"
LONGEST_BUILD = 120
"""Seconds after which a compiler is given up."""


@cache
def library(name: str, *flags: str) -> ctypes.CDLL | None:
    """The functions of `NAME.cpp`, or None, with a line in the log, where they cannot be had."""
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = _compiler()
    if not compiler:
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tersely" / "kernels"
    said = (
        source.read_bytes(),
        source.with_name(HEADER).read_bytes(),
        *compiler,
        *FLAGS,
        *flags,
        platform.machine(),
        _processor(),
    )
    built = folder / f"{name}-{hashlib.sha256(repr(said).encode()).hexdigest()[:24]}.so"
    with suppress(OSError):  # not there yet, or not whole
        return ctypes.CDLL(str(built))
    try:
        _build([*compiler, *FLAGS, *flags], source, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as failed:
        said_last = (getattr(failed, "stderr", None) or str(failed)).strip().splitlines()[-1:]
        logger.warning(
            "%s cannot build %s.cpp; slower operations of PyTorch run in its place: %s",
            shlex.join(compiler),
            name,
            "".join(said_last) or "it did not say why",
        )
        return None


def _build(command: list[str], source: Path, built: Path) -> None:
    """Whole or not at all: several processes may do this at once."""
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder, "kernel.so")
        command = [*command, str(source), "-o", str(made)]
        tried = subprocess.run(
            [*command, FOR_THIS_PROCESSOR], capture_output=True, text=True, timeout=LONGEST_BUILD, check=False
        )
        if tried.returncode:  # not every compiler knows every processor
            subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_BUILD, check=True)
        with made.open("rb") as written:
            os.fsync(written.fileno())  # half a library, after a power cut, would end the process that opens it
        made.replace(built)


@cache
def _compiler() -> list[str]:
    """The command as CXX has it, or what is usual; empty, with a line in the log, where there is none."""
    commands = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    found = next((command for command in commands if command and shutil.which(command[0])), [])
    if not found:
        logger.warning(
            "no C++ compiler; slower operations of PyTorch run in the place of kernels (set CXX, or install g++)"
        )
    return found


def _processor() -> str:
    """What tells processors apart that need different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
