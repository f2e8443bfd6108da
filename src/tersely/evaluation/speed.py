"""Tokens per second, as someone who waits for an answer sees them: one sequence, no batch.

Two speeds, because two things limit them.  *Prefill* reads a prompt in one forward pass and is bound by arithmetic.
*Decode* makes one token after the other, reads every weight for each of them, and is bound by the memory's bandwidth:
this is where a smaller model is faster, if it is.

The model runs as it is used: its own forward, its own cache, greedy choice.  The amounts are fixed, so that figures of
different models compare.  What comes first warms up (threads, allocators, kernels compiled on first use) and is not
counted; of what follows, the median is reported, and its spread says how far to trust it.

`measure_batches` is the fuller account, for one sequence and for several at once: prefill of 512 tokens, 3 times to
warm up and 10 times measured; decode of 128 tokens after a prompt of 128, every step measured after 3 that warm up (the
greedy token is fed whatever it is, so that no answer ends early).  Medians and quartiles are over these repeats and
steps.  A context that is shorter than that shortens both; the amounts are stated.

What decode is bound by can be counted: each step reads every weight once (of a table that only looks tokens up, a row a
sequence) and every sequence's cache.  `bytes_read_per_token` is that, by the sizes of the tensors as they are held.  It
is an upper bound for a mixture of experts, most of which rest, and for kernels that skip.

Source: the protocol is that of Frantar et al., GPTQ, 2023, section 4 (arXiv 2210.17323), median step time with
synchronisation after each step; amounts and quartiles are ours.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersely.errors import RecipeError
from tersely.evaluation.memory import weight_bytes
from tersely.evaluation.perplexity import require_causal, undisturbed, vocabulary_size
from tersely.kinds import TiedHead
from tersely.memory import peak_memory, resident_memory
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


PREFILL_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 512, 128, 128
PREFILL_WARM_UP, PREFILL_REPEATS, STEPS_WARM_UP = 3, 10, 3
BATCHES = (1, 8)


@dataclass(frozen=True)
class Quartiles:
    """Of repeated measurements; the lower one is the smaller number."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class BatchSpeed:
    """Figures with `batch` sequences at once; rates are tokens per second over all of them."""

    batch: int
    prefill_tokens: int
    prefill_tokens_per_second: Quartiles
    first_token_seconds: Quartiles
    """From a prompt of `prefill_tokens` to its first token."""
    prompt_tokens: int
    new_tokens: int
    decode_tokens_per_second: Quartiles
    cache_bytes_per_token: float
    """By which the cache grows with each token of each sequence while decoding."""
    bytes_read_per_token: float
    """Weights and cache at the middle of the decoding, over the sequences that share the reading of the weights."""


@dataclass(frozen=True)
class Throughput:
    """`weight_bytes` are those in memory; `resident_bytes` what the process (on CUDA: tensors) held after measuring."""

    batches: tuple[BatchSpeed, ...]
    weight_bytes: int
    resident_bytes: int | None


def measure_batches(model: PreTrainedModel, batches: Sequence[int] = BATCHES) -> Throughput:
    """Prefill, first token and decode for each number of sequences; see the head of this file.

    The model is left as it was.  Raises RecipeError for a number below 1, a context below 8 tokens, and a model without
    a cache.
    """
    require_causal(model)
    context = context_length(model.config)
    if not batches or min(batches) < 1 or (context is not None and context < 2 * (STEPS_WARM_UP + 1)):
        raise RecipeError(f"batches {list(batches)}, context {context}; give 1 or more sequences, and a longer context")
    with undisturbed(model):
        measured = tuple(_measure_batch(model, batch, context) for batch in batches)
    return Throughput(measured, weight_bytes(model), resident_memory(model.device))


def _measure_batch(model: PreTrainedModel, batch: int, context: int | None) -> BatchSpeed:
    prefill_tokens = min(PREFILL_TOKENS, context or PREFILL_TOKENS)
    prompt_tokens = min(PROMPT_TOKENS, (context or 2 * PROMPT_TOKENS) // 2)
    new_tokens = min(NEW_TOKENS, (context or 2 * NEW_TOKENS) // 2)
    seconds = []
    for _ in range(PREFILL_WARM_UP + PREFILL_REPEATS):
        start = _now(model.device)
        answer = model(input_ids=_prompt(model, batch, prefill_tokens), use_cache=True, logits_to_keep=1)
        answer.logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(_now(model.device) - start)
    seconds = seconds[PREFILL_WARM_UP:]
    answer = model(input_ids=_prompt(model, batch, prompt_tokens), use_cache=True, logits_to_keep=1)
    cache = getattr(answer, "past_key_values", None)
    if cache is None:
        raise RecipeError(f"{type(model).__name__} returns no cache, so that it cannot decode token by token")
    held, steps = cache_bytes(cache), []
    token = answer.logits[:, -1].argmax(-1, keepdim=True)
    for _ in range(new_tokens):
        start = _now(model.device)
        answer = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, token = answer.past_key_values, answer.logits[:, -1].argmax(-1, keepdim=True)
        steps.append(_now(model.device) - start)
    middle = (held + cache_bytes(cache)) / 2
    return BatchSpeed(
        batch=batch,
        prefill_tokens=prefill_tokens,
        prefill_tokens_per_second=_quartiles([batch * prefill_tokens / one for one in seconds]),
        first_token_seconds=_quartiles(seconds),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        decode_tokens_per_second=_quartiles([batch / one for one in steps[STEPS_WARM_UP:]]),
        cache_bytes_per_token=(cache_bytes(cache) - held) / (batch * new_tokens),
        bytes_read_per_token=(_weights_read(model, batch) + middle) / batch,
    )


def cache_bytes(cache: object) -> int:
    """Bytes of the tensors that a cache of transformers holds, whatever its layers call them."""
    found: dict[int, int] = {}
    waiting, met = [cache], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            found[one.data_ptr()] = max(found.get(one.data_ptr(), 0), one.nbytes)
        elif id(one) not in met and not isinstance(one, nn.Module | str | bytes):
            met.add(id(one))
            if isinstance(one, list | tuple):
                waiting += one
            elif isinstance(one, dict):
                waiting += one.values()
            elif type(one).__module__.split(".")[0] in ("transformers", "tersely"):
                waiting += vars(one).values() if hasattr(one, "__dict__") else ()
    return sum(found.values())


def _weights_read(model: PreTrainedModel, batch: int) -> int:
    """Bytes of all weights, but of a table that is no head at the same time only the rows of the tokens."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = list(table.parameters()) + list(table.buffers())
    read = head.holder if isinstance(head, TiedHead) else head  # its table is a child of the embedding
    shared = set() if read is None else {tensor.data_ptr() for tensor in (*read.parameters(), *read.buffers())}
    looked_up = [weight for weight in weights if weight.data_ptr() not in shared and weight.ndim > 1]
    rows = sum(batch * weight.nbytes // weight.shape[0] for weight in looked_up)
    return weight_bytes(model) - sum(weight.nbytes for weight in looked_up) + rows


def _prompt(model: PreTrainedModel, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Fixed token numbers, others for every sequence."""
    numbers = torch.arange(batch * tokens, device=model.device) % vocabulary_size(model.config)
    return numbers.view(batch, tokens)


def _quartiles(values: Sequence[float]) -> Quartiles:
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return Quartiles(middle, lower, upper)


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
