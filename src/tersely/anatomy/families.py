"""Where each family of models keeps its parts: the one table of names.

Every path is relative to a block, but for those that the comments say are relative to `model.base_model`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Family:
    """How one family names the parts of its blocks.

    A path of `linears` may be absent from a block only if it belongs to the feed-forward part and the block has experts
    instead; any other gap means that the modelling code has moved, and is an error.
    """

    blocks: str
    """Path of the list of blocks, relative to the base model."""
    linears: Mapping[str, str]
    """Role → path relative to the block, in order of execution."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Weights that mix experts: path relative to the block → the reason why they are kept."""
    interleaved: bool = False
    """Rows of a fused attention.qkv run head by head (q₀ k₀ v₀ q₁ k₁ v₁ …) instead of all q, all k, all v."""
    needs_first_token: bool = False
    """Trained with a BOS token in front of every text; without it the text is out of distribution."""
    attention: str = "self_attn"
    """Path of the attention module, whose forward pass mixes the tokens."""
    norms: Mapping[str, str] = field(default_factory=dict)
    """Door → path of the norm whose output comes through it, and through it only; empty where norms stand in the
    residual stream itself."""
    final_norm: str | None = None
    """Path of the norm before the head, relative to the base model."""
    embeddings: tuple[str, ...] = ()
    """What writes the first hidden state, relative to the base model."""
    gain_offset: float = 0.0
    """Added to the stored gain of every norm: 1 where gains are stored as their difference from one."""
    mixed_norms: str | None = None
    """Why the residual stream of this family cannot be turned into another basis; None where it can."""
    flexible_heads: bool = False
    """The attention module counts its heads by the width of q, k and v, so that heads can be removed from these."""


_SELF_ATTENTION = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
}
_NORMS: dict[str, Any] = {
    "norms": {"attention.in": "input_layernorm", "mlp.in": "post_attention_layernorm"},
    "final_norm": "norm",
    "embeddings": ("embed_tokens",),
}
_LLAMA: dict[str, Any] = _NORMS | {"flexible_heads": True}
_GEMMA: dict[str, Any] = _LLAMA | {
    "norms": {"attention.in": "input_layernorm", "mlp.in": "pre_feedforward_layernorm"},
    "needs_first_token": True,
    "gain_offset": 1.0,
    "mixed_norms": "it norms what attention and MLP add to the residual stream, with gains that no rotation passes",
}
POST_NORM = "its norms, gains and all, stand in the residual stream itself"
_GATED_MLP = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
_EXPERTS = {
    "mlp.gate.weight": "routing among experts",
    "mlp.experts.gate_up_proj": "fused over all experts",
    "mlp.experts.down_proj": "fused over all experts",
}

FAMILIES: dict[str, Family] = {
    "llama": Family("layers", _SELF_ATTENTION | _GATED_MLP, **_LLAMA),
    "mistral": Family("layers", _SELF_ATTENTION | _GATED_MLP, **_LLAMA),
    "qwen2": Family("layers", _SELF_ATTENTION | _GATED_MLP, **_LLAMA),
    "qwen3": Family("layers", _SELF_ATTENTION | _GATED_MLP, **_LLAMA),
    "gemma2": Family("layers", _SELF_ATTENTION | _GATED_MLP, **_GEMMA),
    "gemma3_text": Family("layers", _SELF_ATTENTION | _GATED_MLP, **_GEMMA),
    "gemma3": Family(
        "language_model.layers",
        _SELF_ATTENTION | _GATED_MLP,
        **_GEMMA | {"final_norm": "language_model.norm", "embeddings": ("language_model.embed_tokens",)},
    ),
    "mixtral": Family("layers", _SELF_ATTENTION, _EXPERTS, **_LLAMA),
    "qwen3_moe": Family("layers", _SELF_ATTENTION | _GATED_MLP, _EXPERTS, **_LLAMA),
    "phi3": Family(
        "layers",
        {
            "attention.qkv": "self_attn.qkv_proj",
            "attention.o": "self_attn.o_proj",
            "mlp.gate_up": "mlp.gate_up_proj",
            "mlp.down": "mlp.down_proj",
        },
        **_NORMS,
    ),
    "opt": Family(
        "decoder.layers",
        _SELF_ATTENTION | {"attention.o": "self_attn.out_proj", "mlp.up": "fc1", "mlp.down": "fc2"},
        norms={"attention.in": "self_attn_layer_norm", "mlp.in": "final_layer_norm"},
        final_norm="decoder.final_layer_norm",
        embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
    ),
    "gpt2": Family(
        "h",
        {"attention.qkv": "attn.c_attn", "attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
        attention="attn",
        norms={"attention.in": "ln_1", "mlp.in": "ln_2"},
        final_norm="ln_f",
        embeddings=("wte", "wpe"),
    ),
    "gpt_neox": Family(
        "layers",
        {
            "attention.qkv": "attention.query_key_value",
            "attention.o": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        interleaved=True,
        attention="attention",
        norms={"attention.in": "input_layernorm", "mlp.in": "post_attention_layernorm"},
        final_norm="final_layer_norm",
        embeddings=("embed_in",),
    ),
    "bert": Family(
        "encoder.layer",
        {
            "attention.q": "attention.self.query",
            "attention.k": "attention.self.key",
            "attention.v": "attention.self.value",
            "attention.o": "attention.output.dense",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
        },
        attention="attention.self",
        embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"),
        mixed_norms=POST_NORM,
        flexible_heads=True,
    ),
    "distilbert": Family(
        "transformer.layer",
        {
            "attention.q": "attention.q_lin",
            "attention.k": "attention.k_lin",
            "attention.v": "attention.v_lin",
            "attention.o": "attention.out_lin",
            "mlp.up": "ffn.lin1",
            "mlp.down": "ffn.lin2",
        },
        attention="attention",
        embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
        mixed_norms=POST_NORM,
        flexible_heads=True,
    ),
}

# The door behind which a role stands.
READS = {
    "attention.q": "attention.in",
    "attention.k": "attention.in",
    "attention.v": "attention.in",
    "attention.qkv": "attention.in",
    "attention.o": "attention.mix",
    "mlp.gate": "mlp.in",
    "mlp.up": "mlp.in",
    "mlp.gate_up": "mlp.in",
    "mlp.down": "mlp.middle",
}

# Role that writes to the residual stream → the door whose norm reads the stream as it is before that.
WRITES_BEHIND = {"attention.o": "attention.in", "mlp.down": "mlp.in"}

# What counts as a linear.  Conv1D is GPT-2's, stored transposed.
LINEARS = (nn.Linear, Conv1D)

# Children of a kind that read what the kind itself reads.
SAME_INPUT = ("down", "dense", "terms")

# Fused role → the parts it holds, in the order of its rows.
FUSED = {"attention.qkv": ("q", "k", "v"), "mlp.gate_up": ("gate", "up")}

# What can be a target outside of the blocks, each named alone: `all` is the linears of the blocks.
OUTSIDE = frozenset({"embeddings", "head"})
