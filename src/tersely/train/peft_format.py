"""Adapters in the format of the `peft` library: a folder of adapter_config.json and adapter_model.safetensors.

Per linear it holds A (rank × in) and B (out × rank); what is added to the weight is scale · B A.  The scale is
lora_alpha / r, or lora_alpha / √r with ``use_rslora``; ranks and alphas of single modules stand in patterns.  Tensors
are named ``base_model.model.<module>.lora_A.weight``.

Read is plain LoRA.  A folder that asks for more (weight-decomposed updates, whole modules, biases, embeddings, a base
that was changed at the start) is refused with the setting that asks for it: added as plain updates it would give
another model without a word.

Source: the format as `peft` 0.21 writes and reads it; tested against it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tersely.errors import AnatomyError, CheckpointError
from tersely.journal import commit_tensors, commit_text, read_tensors
from tersely.train.relax.adapter import Adapted, absorb, shape_of, stock
from tersely.train.relax.base import Relaxed
from tersely.train.relax.kasa import KnowledgeAdapted
from tersely.train.standing import module_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Settings that change nothing about a trained update, whatever they say.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Settings that are understood; every other one must be off.
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# Ways to draw the first A and B that leave the weight beside them alone.
_DRAWN = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Update:
    """What is added to one weight: scale · up · down."""

    up: Float[Tensor, "out rank"]
    down: Float[Tensor, "rank in"]
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def updates_of(relaxed: Mapping[str, Relaxed]) -> dict[str, Update]:
    """What adapters have learned, relative to the linears that they were put on: of a truncating KaSA adapter this
    includes what it dropped, and has twice its rank.  Raises CheckpointError for relaxations that are no updates."""
    found = {}
    for name, module in relaxed.items():
        if not isinstance(module, Adapted | KnowledgeAdapted):
            raise CheckpointError(f"{name}: a {type(module).__name__} is no low-rank update; harden and save the model")
        up, down = module.update()
        found[name] = Update(up, down, 1.0)
    return found


def write_adapter(folder: Path, model: nn.Module, updates: Mapping[str, Update], base: str | None = None) -> None:
    """Write updates of the named plain linears of `model`, as it was before it was relaxed or after; `base` is the
    folder or hub name of the model they belong to."""
    if not updates:
        raise CheckpointError("an adapter without any update; nothing to write")
    names = list(updates)
    ranks = [update.rank for update in updates.values()]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, update in updates.items():
        # contiguous copies: factors may be views of one tensor
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.down.detach().clone().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.up.detach().clone().contiguous()
    commit_tensors(folder / TENSORS, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": ranks[0],
        "lora_alpha": updates[names[0]].scale * ranks[0],
        "rank_pattern": {re.escape(name): rank for name, rank in zip(names, ranks, strict=True) if rank != ranks[0]},
        "alpha_pattern": {
            re.escape(name): update.scale * update.rank
            for name, update in updates.items()
            if update.scale * update.rank != updates[names[0]].scale * ranks[0]
        },
        "target_modules": names,
        "fan_in_fan_out": any(_is_transposed(model, name) for name in names),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    commit_text(folder / CONFIG, json.dumps(config, indent=2))  # last: a folder with it is complete


def read_adapter(folder: Path) -> dict[str, Update]:
    """Module name → update.  Raises CheckpointError for a folder that is no adapter, or asks for more than LoRA."""
    config = _config(folder)
    try:
        tensors = read_tensors(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / TENSORS} cannot be read ({error}); wanted safetensors of peft") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_(A|B)\.weight", key)
        if found is None:
            raise CheckpointError(f"{folder / TENSORS} holds {key}, which is no part of a LoRA update of a linear")
        halves.setdefault(found[1], {})[found[2]] = tensor
    return {name: _update(name, pair, config) for name, pair in halves.items()}


def apply_adapter(model: nn.Module, updates: Mapping[str, Update]) -> dict[str, nn.Module]:
    """Add the updates to the linears of a model, exactly (see `relax.adapter.absorb`), and give what now stands in
    their places by name.  Raises before anything is changed."""
    changed: dict[str, nn.Module] = {}
    for name, update in updates.items():
        linear = module_of(model, name)
        wanted = (update.up.shape[0], update.down.shape[1])
        if shape_of(linear) != wanted:
            raise AnatomyError(f"{name} has the shape {shape_of(linear)}, the adapter is for {wanted}; another base?")
        device = stock(linear).device
        up = update.scale * update.up.to(device, torch.float64)
        changed[name] = absorb(linear, up, update.down.to(device, torch.float64)).train(linear.training)
    for name, module in changed.items():
        model.set_submodule(name, module)
    return changed


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read ({error}); wanted a folder of peft") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} holds a {config.get('peft_type')} adapter; only LORA can be read")
    plain = {"bias": ("none",), "init_lora_weights": _DRAWN}
    for key, value in config.items():
        if key in _HARMLESS | _READ or value in plain.get(key, (None, False, 0, "", [], {})):
            continue
        raise CheckpointError(f"{folder / CONFIG}: {key} = {value!r} asks for more than a plain LoRA update")
    return config


def _update(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> Update:
    if set(pair) != {"A", "B"}:
        raise CheckpointError(f"the adapter holds only lora_{''.join(pair)} of {name}; wanted both A and B")
    down, up = pair["A"], pair["B"]
    rank = _of(name, config.get("rank_pattern"), config["r"])
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise CheckpointError(
            f"the adapter of {name} has A of shape {tuple(down.shape)} and B of {tuple(up.shape)}; wanted (rank, in) "
            f"and (out, rank) with the rank {rank} of its configuration"
        )
    alpha = _of(name, config.get("alpha_pattern"), config["lora_alpha"])
    return Update(up, down, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of(name: str, pattern: Mapping[str, Any] | None, usual: Any) -> Any:
    """The value for a module: that of the first pattern which matches its name or the end of it, as peft has it."""
    matching = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, usual)


def _is_transposed(model: nn.Module, name: str) -> bool:
    linear = module_of(model, name)
    if isinstance(linear, Adapted | KnowledgeAdapted):
        linear = linear.base
    if not isinstance(linear, nn.Linear | Conv1D):
        raise CheckpointError(
            f"{name} is a {type(linear).__name__}; peft adapts plain linears only, so this update cannot be written"
        )
    return isinstance(linear, Conv1D)
