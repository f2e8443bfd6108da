"""The contract of a conversion, and what it may know of a stock attention.

A conversion exchanges a part of the architecture: the same weights, another function.  It needs no statistics and has
no budget; what it loses, training has to win back.  It is a frozen dataclass of hyperparameters with one pure function
that builds the new attention of one block from tensors; it never sees a model.

`attention_settings` is what looks at the model instead.  It asks for everything by which an attention could differ from
softmax(scaling · q kᵀ) v with rotary positions, and refuses what it does not know: an attention that is rebuilt with a
difference overlooked would answer, only wrongly.
"""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from tersely.anatomy import Unit
from tersely.errors import AnatomyError
from tersely.kinds import Kind
from tersely.kinds.attention import LINEARS, NORMS, Attention, AttentionSettings, AttentionShape

# Kinds of rotary positions whose frequencies do not depend on the text that is read.
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")


class Conversion(Protocol):
    """Tensors are addressed by the last word of a role (q, k, v, o); `weights` also holds the gains of the norms of
    heads, q_norm and k_norm, where there are any (see `norm_tensors`)."""

    paper: ClassVar[str]
    """Authors, year, title, identifier."""

    summary: ClassVar[str]
    """One line for listings."""

    roles: ClassVar[tuple[str, ...]]
    """The units that it treats: attention, mlp."""

    def check(self, unit: Unit, attention: AttentionSettings) -> None:
        """Raises AnatomyError with the reason where this unit cannot be treated."""

    def convert(
        self, unit: Unit, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], attention: AttentionSettings
    ) -> dict[str, Kind]:
        """Do it: the new attention, with all its parts, under the key "" which stands for `unit.module` itself."""


def check_attention(unit: Unit) -> None:
    """Raises AnatomyError unless the unit is an attention with linears of the usual four names."""
    if unit.role != "attention":
        raise AnatomyError(f"{unit.name} is no attention")
    for role, name in LINEARS.items():
        path = unit.sites[role].name if role in unit.sites else None
        if path != f"{unit.module}.{name}":
            raise AnatomyError(
                f"{unit.name}: wanted a linear {unit.module}.{name} for {role}, the family has {path or 'none'}; only "
                "attention with separate q_proj, k_proj, v_proj and o_proj can be exchanged"
            )


def attention_settings(model: PreTrainedModel, unit: Unit) -> AttentionSettings:
    """Read what the attention of a unit does; parameters are not read, so they may be on the meta device.

    Raises AnatomyError for everything that the attention of ours would not reproduce.
    """
    check_attention(unit)
    module, config = model.get_submodule(unit.module), model.config.get_text_config()
    if isinstance(module, Attention):
        raise AnatomyError(f"{unit.module} is an attention of tersely's already; start from the original model")
    _check_parts(module, unit)
    rotary = _rotary(model, unit)
    frequencies = tuple(rotary.get_buffer("inv_freq").float().tolist())
    heads = unit.heads
    if heads is None or 2 * len(frequencies) != heads.width:
        width = None if heads is None else heads.width
        raise AnatomyError(
            f"{unit.name}: {len(frequencies)} rotary frequencies for heads of width {width}; wanted half"
        )
    norm = getattr(module, "q_norm", None)
    # some families give the window to the module, the others leave it in the configuration
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
    shape = AttentionShape(
        layer=module.layer_idx,  # type: ignore[arg-type]
        hidden=unit.sites["q"].in_features,
        query_heads=heads.query,
        key_value_heads=heads.key_value,
        key_width=heads.width,
        value_width=heads.width,
        scaling=float(module.scaling),  # type: ignore[arg-type]
        sliding_window=window,  # type: ignore[arg-type]
        dropout=float(module.attention_dropout),  # type: ignore[arg-type]
        norm_eps=None if norm is None else float(norm.variance_epsilon),
    )
    length = getattr(config, "train_window", None) or config.max_position_embeddings
    return AttentionSettings(shape, frequencies, float(rotary.attention_scaling), int(length))  # type: ignore[arg-type]


def norm_tensors(unit: Unit, attention: AttentionSettings) -> dict[str, str]:
    """q_norm, k_norm → the full name of the gain; empty where heads are not normed."""
    return {} if attention.shape.norm_eps is None else {name: f"{unit.module}.{name}.weight" for name in NORMS}


def _check_parts(module: nn.Module, unit: Unit) -> None:
    """Raises AnatomyError where the module has more to it than we know, or less."""
    where = f"{unit.module} ({type(module).__name__})"
    children = {name for name, _ in module.named_children()}
    if strange := children - {*LINEARS.values(), *NORMS}:
        raise AnatomyError(f"{where} has parts that are not known here: {', '.join(sorted(strange))}")
    if strange := {name for name, _ in module.named_parameters(recurse=False)}:
        raise AnatomyError(f"{where} has parameters that are not known here: {', '.join(sorted(strange))}")
    if missing := [name for name in ("layer_idx", "scaling", "attention_dropout") if not hasattr(module, name)]:
        raise AnatomyError(f"{where} does not say its {', '.join(missing)}; its family is not supported")
    if not getattr(module, "is_causal", False):
        raise AnatomyError(f"{where} is not causal; a cache and its positions make sense only where it is")
    for setting in ("attn_logit_softcapping", "softcap"):
        if getattr(module, setting, None) is not None:
            raise AnatomyError(f"{where} caps its scores ({setting}), which the attention of ours does not")
    if not getattr(module, "use_rope", True):
        raise AnatomyError(f"{where} does not use rotary positions; only attention that does can be exchanged")
    normed = [name for name in NORMS if name in children]
    width = unit.heads.width if unit.heads is not None else None
    for name in normed:
        norm = module.get_submodule(name)
        gain = getattr(norm, "weight", None)
        # a norm that calls its epsilon otherwise may add one to its gain as well
        if len(normed) != len(NORMS) or gain is None or tuple(gain.shape) != (width,):
            raise AnatomyError(f"{where}: {name} is not one of two norms with a gain for every channel of a head")
        if not hasattr(norm, "variance_epsilon"):
            raise AnatomyError(f"{where}: {name} ({type(norm).__name__}) is no RMS norm of a kind known here")


def _rotary(model: PreTrainedModel, unit: Unit) -> nn.Module:
    """The one module that makes the tables of positions."""
    found = [module for module in model.modules() if "inv_freq" in dict(module.named_buffers(recurse=False))]
    if len(found) != 1:
        raise AnatomyError(
            f"{unit.name}: {len(found)} rotary modules in the model, wanted one for all blocks; only attention with "
            "plain rotary positions can be exchanged"
        )
    rotation = getattr(found[0], "rope_type", None)
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rotation not in FIXED_ROTATIONS or "mrope_section" in parameters:
        raise AnatomyError(
            f"{unit.name}: rotary positions of type {rotation!r} depend on the text that is read, or on more than a "
            f"position; known: {', '.join(FIXED_ROTATIONS)}"
        )
    if found[0].get_buffer("inv_freq").is_meta:
        raise AnatomyError(f"{unit.name}: the rotary frequencies are on the meta device; build the model with buffers")
    return found[0]
