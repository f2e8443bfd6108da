"""The stock architecture at full size, for any software: every linear kind as the weight it stands for.

Positions and widths must be the stock ones: what an attention of ours computes has no stock counterpart.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from tersely.checkpoint import Edit, Source, State, check_finite, write_model
from tersely.deltas.folder import outermost
from tersely.errors import CheckpointError
from tersely.export.modules import module_of
from tersely.kinds import LinearKind, QuantizedEmbedding, dense_weight, link, link_tables
from tersely.recipe import parse_size


def write_dense(source: Source, destination: Path) -> None:
    """In the model's dtype.  Raises CheckpointError where something has no dense counterpart."""
    places = dict(source.stock_skeleton().named_modules())
    modules = {name: module_of(source, name) for name in outermost(source.manifest)}
    link(nn.ModuleList(modules.values()))
    link_tables(nn.ModuleList(modules.values()))
    odd = [name for name, module in modules.items() if not _fits(module, places.get(name))]
    if odd:
        raise CheckpointError(
            f"{source.folder}: no dense counterpart in the stock architecture for {', '.join(odd[:5])}"
            + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        )
    plain = {name: _plain(module, places[name], source.dtype) for name, module in modules.items()}
    for name, state in plain.items():  # a product of finite factors may be too large for the dtype
        check_finite(source.folder, {f"{name}.{part}": tensor for part, tensor in state.items()})
    stock = copy.copy(source)
    stock.config = copy.deepcopy(source.config)
    del stock.config.quantization_config  # of the manifest nothing is left
    write_model(destination, stock, Edit(plain=plain), parse_size("2GB"))


def _fits(module: nn.Module, place: nn.Module | None) -> bool:
    if place is None:
        return False
    if isinstance(module, QuantizedEmbedding):
        return tuple(place.get_parameter("weight").shape) == (module.num_embeddings, module.embedding_dim)
    if not isinstance(module, LinearKind):
        return False
    weight = place.get_parameter("weight")
    return tuple(weight.shape) in {
        (module.out_features, module.in_features),
        (module.in_features, module.out_features) if hasattr(place, "nf") else None,
    }


def _plain(module: nn.Module, place: nn.Module, dtype: torch.dtype) -> State:
    if isinstance(module, QuantizedEmbedding):
        return {"weight": module.to_dense().to(dtype)}
    weight = dense_weight(module).to(dtype)
    biases = [tensor for name, tensor in module.state_dict().items() if name.rpartition(".")[2] == "bias"]
    # GPT-2's linears are stored (in, out)
    state = {"weight": (weight.T if hasattr(place, "nf") else weight).contiguous()}
    return state | ({"bias": biases[0].to(dtype)} if biases else {})
