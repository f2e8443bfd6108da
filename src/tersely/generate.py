"""Let a model write: continue a text piece by piece, or draw rows of tokens from nothing."""

import math
from collections.abc import Iterable, Iterator
from threading import Thread
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from tersely.errors import NumericalError, RecipeError
from tersely.text import context_length

USUAL = 64
"""Tokens that are added where nobody says how many."""


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int | None,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Yield the prompt's continuation as it is decoded, on the path that transformers' `generate` takes.

    `tokens`: how many to add at most; None for `USUAL`, or fewer where the context ends.  Raises RecipeError for what
    is out of range, and for a prompt or a number of tokens beyond the context, where positions were never trained.
    """
    if tokens is not None and tokens < 1:
        raise RecipeError(f"--tokens {tokens}; wanted 1 or more")
    if not 0 <= temperature < math.inf:
        raise RecipeError(f"--temperature {temperature}; wanted 0 or more, a finite number")
    if not model.can_generate():
        raise RecipeError(f"{type(model).__name__} does not generate text; it is no causal language model")
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    if given["input_ids"].shape[1] == 0:
        raise RecipeError("--prompt is empty; give it some text")
    room = _room(model, given["input_ids"].shape[1])
    if tokens is None:
        tokens = USUAL if room is None else min(USUAL, room)
    elif room is not None and tokens > room:
        raise RecipeError(f"--tokens {tokens} go beyond the model's context behind this prompt; give {room} or less")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    drawing = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    failure: list[BaseException] = []
    writer: Any = model  # transformers does not say in types what `can_generate` has told

    def work() -> None:
        torch.manual_seed(seed)
        try:
            writer.generate(**given, **drawing, max_new_tokens=tokens, streamer=streamer)
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


def _room(model: PreTrainedModel, given: int) -> int | None:
    """Tokens that may follow so many given ones; None where the model knows no limit."""
    context = context_length(model.config)
    if context is not None and given >= context:
        raise RecipeError(f"--prompt has {given} tokens, and the model's context of {context} has no room; shorten it")
    return None if context is None else context - given


def draw(model: Any, start: int, rows: int, tokens: int, never: Iterable[int]) -> Int[Tensor, "{rows} {tokens}"]:
    """What the model writes behind the token `start`, which is left out: every token drawn from all that the model
    predicts, at temperature 1, but for the tokens that are `never` drawn.

    Random numbers are PyTorch's own, as they stand.  Raises NumericalError for predictions that are not finite.
    """
    prompt = torch.full((rows, 1), start, device=model.device)
    # one token for every step, whatever the checkpoint's own settings are; what ends a text is among the tokens never
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        suppress_tokens=sorted(never) or None,
        pad_token_id=start,
    )
    try:
        written: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NumericalError(f"the model cannot write: its predictions are not finite ({error})") from error
    return written[:, 1:]
