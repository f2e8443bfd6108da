"""Tiny random models of every family that tersely knows: two blocks, hidden width 32, 64 tokens.

The shapes are awkward on purpose: heads that do not divide the hidden width where a family allows it, queries grouped,
windows shorter than the test batch, and blocks that differ (in their masks, or dense beside experts).
"""

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

SHAPE = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
PLAIN = SHAPE | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = PLAIN | {"intermediate_size": 44, "num_key_value_heads": 2}
# Block 0 sees a window, block 1 everything, each with a mask (in Gemma 3 also with rotary tables) of its own.
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
GEMMA3 = GATED | HYBRID | {"head_dim": 16, "query_pre_attn_scalar": 16}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

# Family → the class of its configuration, the settings, and the model class with its usual head.
TINY: dict[str, tuple[str, dict[str, object], str]] = {
    "llama": ("LlamaConfig", GATED, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", GATED | {"head_dim": 16, "sliding_window": 4}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", GATED | HYBRID | {"use_sliding_window": True}, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", GATED | HYBRID | {"use_sliding_window": True, "head_dim": 16}, "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", GATED | HYBRID | {"head_dim": 16, "query_pre_attn_scalar": 16}, "Gemma2ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", GEMMA3, "Gemma3ForCausalLM"),
    "gemma3": (
        "Gemma3Config",
        {"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 63},
        "Gemma3ForConditionalGeneration",
    ),
    "mixtral": ("MixtralConfig", GATED | {"num_local_experts": 4, "sliding_window": 4}, "MixtralForCausalLM"),
    # The first block is dense, the second has experts.
    "qwen3_moe": (
        "Qwen3MoeConfig",
        GATED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [0]},
        "Qwen3MoeForCausalLM",
    ),
    "phi3": ("Phi3Config", GATED | {"original_max_position_embeddings": 64}, "Phi3ForCausalLM"),
    # The embedding is narrower than the hidden state, as in OPT-350m: two projections outside the blocks.
    "opt": ("OPTConfig", PLAIN | {"ffn_dim": 44, "word_embed_proj_dim": 24}, "OPTForCausalLM"),
    "gpt2": ("GPT2Config", PLAIN | {"n_inner": 44}, "GPT2LMHeadModel"),
    "gpt_neox": ("GPTNeoXConfig", PLAIN | {"intermediate_size": 44}, "GPTNeoXForCausalLM"),
    "bert": ("BertConfig", PLAIN | {"intermediate_size": 44}, "BertForMaskedLM"),
    "distilbert": ("DistilBertConfig", PLAIN | {"hidden_dim": 44}, "DistilBertForMaskedLM"),
}


def tiny_config(family: str) -> PreTrainedConfig:
    """A fresh configuration, free to be changed, that names the model class with the usual head."""
    config_class, settings, architecture = TINY[family]
    return getattr(transformers, config_class)(**settings, architectures=[architecture])


def tiny_model(family: str, architecture: str | None = None, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A model in evaluation mode, the same at every call; gains and biases are random too: a lost one shows."""
    config = config or tiny_config(family)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, architecture or config.architectures[0])(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tiny_batch() -> dict[str, Tensor]:
    """Two sequences of twelve tokens, the second one padded at its end."""
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}
