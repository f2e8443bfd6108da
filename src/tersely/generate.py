"""Continue a text with a model, piece by piece."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from tersely.errors import RecipeError


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Yield the prompt's continuation as it is decoded, on the path that transformers' `generate` takes."""
    if tokens < 1:
        raise RecipeError(f"--tokens {tokens}; wanted 1 or more")
    if temperature < 0:
        raise RecipeError(f"--temperature {temperature}; wanted 0 or more")
    if not model.can_generate():
        raise RecipeError(f"{type(model).__name__} does not generate text; it is no causal language model")
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    if given["input_ids"].shape[1] == 0:
        raise RecipeError("--prompt is empty; give it some text")
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
