"""Packed integers with their scales, as serving engines read them: the format `pack-quantized` of compressed-tensors.

A weight is  W'[i, j] = (code[i, j] - zero[i, g]) · scale[i, g],  g the group of column j, as in `kinds.quantized`.
It is stored as

    weight_packed       [out, ⌈in · bits / 32⌉]      int32, the bits of a row's codes one after the other, lowest first
    weight_scale        [out, groups]                in the dtype of the model
    weight_zero_point   [⌈out · bits / 32⌉, groups]  int32, packed along the rows; absent where zero is 2^(bits-1)
    weight_shape        [2]                          int64

so that our packed rows need four bytes looked at as one word, and nothing is rounded anew.  Readers compute in the
dtype of the scales, which is that of the model: the weight is ours, rounded to that dtype as ours is, if the scales are
exact in it.  Those of 16 bits are in float16 and float32, hardly ever in bfloat16.

What has no counterpart: zero points in floats, tables of levels, scales of columns, rounded inputs, groups that do not
divide a row, widths other than 2, 4 and 8 (0.15 packs those otherwise than 0.19 and later),
linears of GPT-2 (stored the other way round), embeddings, and every other kind.

Source: the package compressed-tensors, 0.15, 0.19 and 0.20.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tersely.checkpoint import Source, State, carry, untied, write_config, write_shards
from tersely.deltas.folder import outermost
from tersely.errors import CheckpointError
from tersely.export.modules import module_of
from tersely.kinds import QuantizedLinear
from tersely.linalg.grid import group_count
from tersely.linalg.packing import pack, unpack
from tersely.recipe import parse_size

WIDTHS = (2, 4, 8)

Scheme = tuple[int, int, bool]
"""Bits, columns of a group (0: the whole row), whether there are zero points."""


def write_compressed_tensors(source: Source, destination: Path) -> None:
    """Raises CheckpointError where something has no counterpart."""
    model: Any = source.stock_skeleton()
    places = dict(model.named_modules())
    states, schemes, lacking = {}, {}, {}
    for name in outermost(source.manifest):
        module = module_of(source, name)
        why = _lacking(module, places.get(name), source.dtype)
        if why is not None or not isinstance(module, QuantizedLinear):
            lacking[name] = why
            continue
        states[name] = _packed(module, source.dtype)
        schemes[name] = (module.bits, module.group, module.zeros is not None)
    if lacking:
        name, why = next(iter(lacking.items()))
        more = f" ({len(lacking) - 1} more have none)" if len(lacking) > 1 else ""
        raise CheckpointError(f"{source.folder}: {name} has no counterpart in compressed-tensors: {why}{more}")
    parts = {f"{name}.{part}": tensor for name, state in states.items() for part, tensor in state.items()}
    stock = model.to(source.dtype).state_dict() | parts
    like = {name: stock[name] for name in _names(model, states)}
    write_shards(
        destination, like, lambda name: parts[name] if name in parts else source.tensor(name), parse_size("2GB")
    )
    carry(source.carried_from, destination)
    left = [path for path, place in places.items() if isinstance(place, nn.Linear) and path not in states]
    write_config(destination, model, source.dtype, _described(schemes, left))


def _lacking(module: nn.Module, place: nn.Module | None, dtype: torch.dtype) -> str | None:
    """Why a module cannot be written; None where it can."""
    if not isinstance(module, QuantizedLinear):
        return f"it is of kind {getattr(module, 'name', type(module).__name__)}; wanted quantized linears alone"
    if type(place) is not nn.Linear or tuple(place.weight.shape) != (module.out_features, module.in_features):
        return "no linear of its size stands there in the stock architecture"
    if module.bits not in WIDTHS:
        return f"{module.bits} bits; wanted {', '.join(map(str, WIDTHS))}"
    if module.levels is not None:
        return f"its levels are those of the table {module.levels}; wanted integers"
    if module.columns is not None:
        return "its columns have scales"
    if module.input_bits is not None:
        return "its input is rounded"
    if module.zeros is not None and module.zeros.dtype != torch.uint8:
        return "its zero points are floats"
    if module.group and module.in_features % module.group:
        return f"groups of {module.group} do not divide its {module.in_features} columns"
    scales = module.grid().scales.values()
    if not torch.equal(scales.to(dtype).float(), scales):
        return f"its scales are not exact in {dtype}, the dtype of the model; compress with --dtype float16"
    return None


def _packed(module: QuantizedLinear, dtype: torch.dtype) -> State:
    state = {
        "weight_packed": _words(module.codes),
        "weight_scale": module.grid().scales.values().to(dtype),
        "weight_shape": torch.tensor([module.out_features, module.in_features]),
    }
    if module.zeros is not None:
        groups = group_count(module.in_features, module.group)
        turned = unpack(module.zeros, module.bits, groups).T.contiguous()
        state["weight_zero_point"] = _words(pack(turned, module.bits)).T.contiguous()
    if module.bias is not None:
        state["bias"] = module.bias.detach().to(dtype)
    return state


def _words(rows: Tensor) -> Tensor:
    """Rows of bytes, four at a time as one word, the first one lowest."""
    filled = pad(rows, (0, -rows.shape[1] % 4)).unflatten(1, (-1, 4)).to(torch.int32)
    word = filled[..., 0] | filled[..., 1] << 8 | filled[..., 2] << 16 | filled[..., 3] << 24
    return word.contiguous()


def _names(model: Any, states: Mapping[str, State]) -> Iterator[str]:
    """What is stored, in the order of the model."""
    for name in untied(model):
        path, _, part = name.rpartition(".")
        if path not in states:
            yield name
        elif part == "weight":  # a bias is among the others of its linear
            yield from (f"{path}.{other}" for other in states[path])


def _described(schemes: Mapping[str, Scheme], left: list[str]) -> dict[str, Any]:
    """The entry of the configuration."""
    kinds = sorted(set(schemes.values()))
    groups = {}
    for number, scheme in enumerate(kinds):
        bits, group, zeros = scheme
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": not zeros,
            "strategy": "group" if group else "channel",
            "group_size": group or None,
            "dynamic": False,
        }
        # the name of a class where all are alike: engines that fuse linears look for that
        targets = ["Linear"] if len(kinds) == 1 else [name for name, of_site in schemes.items() if of_site == scheme]
        groups[f"group_{number}"] = {"targets": targets, "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": left,
    }
