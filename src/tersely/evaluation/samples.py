"""What the model says, beside what the dense model says: greedy continuations of the same prompts.

Greedy, so that both are functions of their weights.  The number of tokens before the first that differs is a measure
people understand, and a harsh one: one near tie ends the agreement, however well either goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tersely.errors import RecipeError
from tersely.evaluation.perplexity import require_causal, undisturbed
from tersely.text import context_length


@dataclass(frozen=True)
class Sample:
    """`dense` and `agreeing`, the tokens before the first that differs, are None without a dense model."""

    prompt: str
    text: str
    dense: str | None = None
    agreeing: int | None = None


def continue_prompts(
    model: PreTrainedModel,
    against: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int = 48,
) -> list[Sample]:
    """Continue each prompt by at most `tokens` tokens, and within the context.

    Raises RecipeError for a prompt that is empty or leaves no room.
    """
    for one in (model, against) if against is not None else (model,):
        require_causal(one)
    given = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    context = context_length(model.config)
    for prompt, numbers in zip(prompts, given, strict=True):
        if numbers.numel() == 0:
            raise RecipeError("an empty prompt; give it some text")
        if context is not None and numbers.numel() >= context:
            raise RecipeError(f"prompt {prompt[:40]!r}… leaves no room in the model's context of {context}")
    samples = []
    for prompt, numbers in zip(prompts, given, strict=True):
        wanted = tokens if context is None else min(tokens, context - numbers.numel())
        ours = _continuation(model, numbers, wanted)
        if against is None:
            samples.append(Sample(prompt, _said(ours, tokenizer)))
            continue
        theirs = _continuation(against, numbers, wanted)
        same = [first == second for first, second in zip(ours, theirs, strict=False)]
        agreeing = same.index(False) if False in same else len(same)
        samples.append(Sample(prompt, _said(ours, tokenizer), _said(theirs, tokenizer), agreeing))
    return samples


def _said(numbers: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(numbers, skip_special_tokens=True))


def _continuation(model: PreTrainedModel, numbers: torch.Tensor, tokens: int) -> list[int]:
    writer: Any = model  # transformers does not say in types what `can_generate` has told
    fed = numbers.to(model.device)
    with undisturbed(model):
        whole = writer.generate(
            fed,
            attention_mask=torch.ones_like(fed),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )
    return [int(number) for number in whole[0, fed.shape[1] :]]
