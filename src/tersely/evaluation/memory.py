"""What a model weighs: on disk, in parameters, and in memory.

Bytes are measured, never derived from a count of parameters: packing, scales, padding and shared tensors are where
computed sizes go wrong.
"""

from pathlib import Path

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


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in memory, what is shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
