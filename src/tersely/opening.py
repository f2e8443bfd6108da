"""Whole models in memory, as transformers opens them; what it would only log is refused."""

from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from tersely.anatomy import model_class
from tersely.checkpoint import read_config, read_headers, skeleton_of, untied, write_shards
from tersely.errors import CheckpointError
from tersely.kinds import Spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def load_with_report(
    folder: Path,
    cls: type["PreTrainedModel"],
    config: "PreTrainedConfig | None" = None,
    dtype: "str | torch.dtype" = "auto",
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """The model as transformers opens it, and what it says of unexpected weights.

    Raises CheckpointError for files that are damaged, and for weights that are missing or of another shape, which
    transformers would fill with random numbers.
    """
    headers = read_headers(folder)  # whose errors say which file is damaged
    try:
        both: Any = cls.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: transformers cannot load it ({reason}); fetch or write it again") from error
    model, report = both
    refuse_missing(folder, report["missing_keys"])
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        place = headers[name].file if name in headers else folder
        raise CheckpointError(f"{place}: {name} has shape {tuple(stored)}, the configuration wants {tuple(wanted)}")
    return model, report


def refuse_missing(folder: Path | str, missing: Collection[str]) -> None:
    """Raises CheckpointError for weights that transformers has filled with random numbers."""
    if missing:
        shown = ", ".join(sorted(missing)[:5])
        raise CheckpointError(f"{folder}: weights are missing for {shown}; the checkpoint is not complete")


def refuse_incomplete(model: "PreTrainedModel", manifest: Mapping[str, Spec], missing: Collection[str]) -> None:
    """Raises CheckpointError where a folder of ours lacks what the class has that it was written from.

    `missing`: names in `model`, which may be of another class: its own head, or its pooler, is new and no lack.
    """
    if not missing:
        return
    prefix = f"{model.base_model_prefix}."
    held = skeleton_of(model.config, manifest).state_dict().keys()
    lacking = {name for name in missing if not held.isdisjoint((name, name.removeprefix(prefix), prefix + name))}
    refuse_missing(str(model.name_or_path), lacking)


def rewrite_names(folder: Path, destination: Path, *, trust_remote_code: bool = False) -> None:
    """Load a checkpoint the way transformers does and store it under the modules' own names, one file a block or so.

    This holds the whole model in memory, once.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    model, _ = load_with_report(folder, model_class(config), config=config)
    destination.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    write_shards(destination, {name: state[name] for name in untied(model)}, lambda name: state[name], 2 * 10**9)
    model.config.save_pretrained(destination)
