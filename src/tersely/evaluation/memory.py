"""What a model weighs: on disk, in parameters, and in memory at its worst moment.

Bytes are measured, never derived from a count of parameters: packing, scales, padding and shared tensors are where
computed sizes go wrong.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tersely.errors import RecipeError
from tersely.kinds import LinearKind


def folder_bytes(path: Path) -> int:
    """Bytes of all files in a folder and below.  A link counts as what it points to, as in the cache of the hub."""
    if not path.is_dir():
        raise RecipeError(f"{path} is no folder; give the folder that the model was saved to")
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def parameter_count(model: nn.Module) -> int:
    """Numbers in the parameters of a model, tied ones once; of packed codes, the weights that they stand for."""
    packed = [module for module in model.modules() if isinstance(module, LinearKind) and module.packed]
    inside = {id(number) for module in packed for name, number in module.named_parameters() if name != "bias"}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return others + sum(module.in_features * module.out_features for module in packed)


def peak_memory(device: torch.device | None = None) -> int:
    """The most memory held at any moment since the process began (or `peak_within` looked last), in bytes.

    On a CUDA device: held by tensors there.  On any other, or none: resident memory of the process, in which
    interpreter, libraries and the loading of the model are included.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not part of Python on Windows, where the rest of this package works

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory(device: torch.device | None = None) -> int | None:
    """Bytes held now: by tensors on a CUDA device, else by the process; None where the system does not tell."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS") if sys.platform == "linux" else None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in memory, what is shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


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
        torch.cuda.reset_peak_memory_stats(device)
        found.before = torch.cuda.memory_allocated(device)
        yield found
        found.highest = torch.cuda.max_memory_allocated(device)
        return
    _hand_back()
    if _forget_peak():
        found.before = _resident("VmRSS")
    yield found
    if found.before is not None:
        found.highest = _resident("VmHWM")


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


def _resident(what: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{what}:")]
    return int(line.split()[1]) * 1024
