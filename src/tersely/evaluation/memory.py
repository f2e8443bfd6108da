"""What a model weighs: on disk, in parameters, and in memory at its worst moment.

Bytes are measured, never derived from a count of parameters: packing, scales, padding and shared tensors are where
computed sizes go wrong.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from tersely.errors import RecipeError


def folder_bytes(path: Path) -> int:
    """Bytes of all files in a folder and below.  A link counts as what it points to, as in the cache of the hub."""
    if not path.is_dir():
        raise RecipeError(f"{path} is no folder; give the folder that the model was saved to")
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def parameter_count(model: nn.Module) -> int:
    """Numbers in the parameters of a model, tied ones once.  Buffers, such as packed integers, are no parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def peak_memory(device: torch.device | None = None) -> int:
    """The most memory held at any moment since the process began, in bytes.

    On a CUDA device: held by tensors there.  On any other, or none: resident memory of the process, in which
    interpreter, libraries and the loading of the model are included.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not part of Python on Windows, where the rest of this package works

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
