"""The low-rank terms of sums over the untouched weights of the recorded base, and nothing else: an adapter of peft."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tersely.checkpoint import Source, locate, open_source
from tersely.deltas.folder import outermost
from tersely.errors import CheckpointError
from tersely.export.modules import module_of
from tersely.kinds import DenseLinear, LowRankLinear, SumLinear
from tersely.recipe import read_recipe
from tersely.train.peft_format import Update, write_adapter


def write_peft(source: Source, destination: Path) -> None:
    """Raises CheckpointError where there is more than an adapter on the base can carry."""
    recipe = source.folder / "recipe.toml"
    if not recipe.is_file():
        raise CheckpointError(f"{source.folder} has no recipe.toml, which would name the base of the adapter")
    named = read_recipe(recipe).model
    base = open_source(locate(named), dtype=str(source.dtype).removeprefix("torch."))
    updates: dict[str, Update] = {}
    taken: dict[str, str] = {}
    for name in outermost(source.manifest):
        module = module_of(source, name)
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
