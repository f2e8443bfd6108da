"""Tokens per second, as someone who waits for an answer sees them: one sequence, no batch.

Two speeds, because two things limit them.  *Prefill* reads a prompt in one forward pass and is bound by arithmetic.
*Decode* makes one token after the other, reads every weight for each of them, and is bound by the memory's bandwidth:
this is where a smaller model is faster, if it is.

The model runs as it is used: its own forward, its own cache, greedy choice.  The amounts are fixed, so that figures of
different models compare.  What comes first warms up (threads, allocators, kernels compiled on first use) and is not
counted; of what follows, the median is reported, and its spread says how far to trust it.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from tersely.errors import RecipeError
from tersely.evaluation.memory import peak_memory
from tersely.evaluation.perplexity import require_causal, undisturbed, vocabulary_size
from tersely.text import context_length


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the median of the repeats, and (largest - smallest) / median."""

    tokens_per_second: float
    spread: float


@dataclass(frozen=True)
class Speed:
    """`peak_bytes` is the peak of the process so far, see `memory.peak_memory`."""

    prefill: Rate
    decode: Rate
    peak_bytes: int


def measure_speed(
    model: PreTrainedModel, *, prompt_tokens: int = 128, new_tokens: int = 64, repeats: int = 5, warm_up: int = 1
) -> Speed:
    """Time `repeats` answers of `new_tokens` tokens to a prompt of `prompt_tokens`, after `warm_up` that do not count.

    The prompt is a fixed sequence of token numbers; what it says does not matter, since a greedy answer of fixed length
    is timed.  The model is left as it was.

    Raises RecipeError for an amount below 1, one beyond the model's context, and for a model without a cache.
    """
    require_causal(model)
    _check_amounts(model, prompt_tokens, new_tokens, repeats, warm_up)
    prompt = torch.arange(prompt_tokens, device=model.device)[None] % vocabulary_size(model.config)
    with undisturbed(model):
        seconds = [_seconds(model, prompt, new_tokens) for _ in range(warm_up + repeats)][warm_up:]
    prefill, decode = zip(*seconds, strict=True)
    return Speed(
        prefill=_rate(prompt_tokens, prefill), decode=_rate(new_tokens, decode), peak_bytes=peak_memory(model.device)
    )


def _seconds(model: PreTrainedModel, prompt: Int[Tensor, "1 prompt"], new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for feeding `new_tokens` tokens after it."""
    start = _now(model.device)
    answer = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = answer.logits[:, -1].argmax(-1, keepdim=True)
    middle = _now(model.device)
    if getattr(answer, "past_key_values", None) is None:
        raise RecipeError(f"{type(model).__name__} returns no cache, so that it cannot decode token by token")
    for _ in range(new_tokens):
        answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True, logits_to_keep=1)
        token = answer.logits[:, -1].argmax(-1, keepdim=True)
    return middle - start, _now(model.device) - middle


def _now(device: torch.device) -> float:
    """Seconds on a steady clock, once all work given to the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _rate(tokens: int, seconds: tuple[float, ...]) -> Rate:
    rates = [tokens / one for one in seconds]
    middle = median(rates)
    return Rate(tokens_per_second=middle, spread=(max(rates) - min(rates)) / middle)


def _check_amounts(model: PreTrainedModel, prompt_tokens: int, new_tokens: int, repeats: int, warm_up: int) -> None:
    if min(prompt_tokens, new_tokens, repeats) < 1 or warm_up < 0:
        raise RecipeError(
            f"{prompt_tokens} prompt tokens, {new_tokens} new tokens, {repeats} repeats, {warm_up} for warming up: "
            "give at least 1 of each (warming up: 0)"
        )
    context = context_length(model.config)
    if context is not None and prompt_tokens + new_tokens > context:
        raise RecipeError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones are beyond the model's context of {context}; "
            "give less of either"
        )
