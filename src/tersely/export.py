"""Folders of ours as others read them: dense, or as an adapter of peft.

Either is offered only where every module has an exact counterpart; otherwise a CheckpointError names those that have
none.
"""

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from tersely.checkpoint import Edit, Source, State, check_finite, locate, open_source, write_model
from tersely.deltas.folder import open_any, outermost
from tersely.destination import check_folder
from tersely.errors import CheckpointError, RecipeError, unknown
from tersely.kinds import (
    DenseLinear,
    LinearKind,
    LowRankLinear,
    Made,
    QuantizedEmbedding,
    SumLinear,
    dense_weight,
    link,
    link_tables,
)
from tersely.recipe import parse_size, read_recipe
from tersely.train.peft_format import Update, write_adapter

FORMATS = ("dense", "peft")


def export(out: Path, destination: Path, to: str, *, trust_remote_code: bool = False) -> None:
    """Write a folder of ours in another format into a new folder."""
    if to not in FORMATS:
        raise RecipeError(unknown("format", to, FORMATS))
    check_folder(destination)
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} exists; choose another folder or remove it")
    source = open_any(out, trust_remote_code=trust_remote_code)
    if not source.manifest:
        raise CheckpointError(f"{out} holds no compressed module; it is an ordinary model already")
    existed = destination.exists()
    try:
        if to == "dense":
            _dense(source, destination)
        else:
            _peft(source, destination)
    except BaseException:  # half of a model must not look like one
        shutil.rmtree(destination, ignore_errors=True)
        if existed:
            destination.mkdir(exist_ok=True)
        raise


def _dense(source: Source, destination: Path) -> None:
    """Every linear kind as the weight it stands for, in the model's dtype.

    Positions and widths must be the stock ones: what an attention of ours computes has no stock counterpart.
    """
    places = dict(source.stock_skeleton().named_modules())
    modules = {name: _module(source, name) for name in outermost(source.manifest)}
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


def _peft(source: Source, destination: Path) -> None:
    """The low-rank terms of sums over the untouched weights of the recorded base, and nothing else."""
    recipe = source.folder / "recipe.toml"
    if not recipe.is_file():
        raise CheckpointError(f"{source.folder} has no recipe.toml, which would name the base of the adapter")
    named = read_recipe(recipe).model
    base = open_source(locate(named), dtype=str(source.dtype).removeprefix("torch."))
    updates: dict[str, Update] = {}
    taken: dict[str, str] = {}
    for name in outermost(source.manifest):
        module = _module(source, name)
        factors = _factors(module)
        if factors is None:
            raise CheckpointError(
                f"{source.folder}: {name} is no sum of a dense weight and one low-rank update; train an adapter with "
                "merge = false on an ordinary model"
            )
        updates[name] = Update(*factors, 1.0)
        inner = ".dense" if isinstance(module.get_submodule("terms.0"), DenseLinear) else ""
        taken |= {f"{name}.terms.0{inner}.{part}": f"{name}.{part}" for part in ("weight", "bias")}
    updated = tuple(f"{name}.terms.1." for name in updates)
    guards = {guard for name in updates for guard in (f"{name}.weight", f"{name}.terms.0.weight")} - taken.keys()
    for stored in source.stored:
        if stored.startswith(updated) or stored in guards:
            continue
        original = taken.get(stored, stored)
        tensor = source.tensor(stored)
        # GPT-2's linears are stored (in, out), and their sums begin with the weight turned round
        same = tensor.T if stored.endswith(".terms.0.dense.weight") else tensor
        if original not in base.stored or not torch.equal(same, base.tensor(original)):
            raise CheckpointError(
                f"{source.folder}: {original} is not that of the base {named}; an adapter alone cannot carry it"
            )
    write_adapter(destination, base.skeleton(), updates, named)


def _module(source: Source, name: str) -> nn.Module:
    """A kind of the folder with its numbers."""
    inside = {n.removeprefix(name).removeprefix("."): spec for n, spec in source.manifest.items() if _below(n, name)}
    module = Made(inside, {}).build()
    tied = {n.removeprefix(f"{name}."): source.tensor(n) for n in source.ties if n.startswith(f"{name}.")}
    module.load_state_dict(source.state(f"{name}.") | tied, assign=True)
    return module


def _below(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


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


def _factors(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """up and down of the one low-rank update of a sum over a plain linear, or over what stands for a `Conv1D`."""
    if not isinstance(module, SumLinear) or len(module.terms) != 2:
        return None
    first, update = module.terms
    if type(first.dense if isinstance(first, DenseLinear) else first) is not nn.Linear:
        return None
    if not isinstance(update, LowRankLinear) or any(type(f) is not nn.Linear for f in (update.down, update.up)):
        return None
    return update.up.weight.detach(), update.down.weight.detach()
