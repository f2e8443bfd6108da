"""Zero-shot tasks: does the model prefer the right answer?

    score(choice)     = Σ log p(token_i | given, tokens before it)         over the tokens of the choice
    acc               = share of questions whose right choice has the highest score (the first, of equal ones)
    acc_norm          = the same with score / characters of the choice: long choices are not put at a disadvantage
    acc (one choice)  = share of questions whose tokens are, one by one, the likeliest
    perplexity        = exp of minus the mean score, of tasks with one choice

How strings become tokens decides points of accuracy, and is done as lm-eval does it.  Given and choice are tokenised as
one string, with the special tokens that the tokenizer adds; the tokens of the given alone say where the choice begins;
blanks at the end of the given belong to the choice.  Where nothing is given, BOS is (EOS of a tokenizer without one).
What is longer than the context loses tokens on the left.

Sequences are sorted by length and padded on the right, which a causal model does not see; no cache is kept.

Of n questions, `stderr` is the usual error of a mean; the interval of an accuracy is Wilson's, which stays within 0 and
1 and holds for few questions, that of a perplexity the exponential of the mean's.

Source: Gao et al., The Language Model Evaluation Harness, 2024 (10.5281/zenodo.12608602); Wilson, Probable Inference,
1927 (10.1080/01621459.1927.10502953).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tersely.errors import NumericalError, RecipeError
from tersely.evaluation.paired import NORMAL_QUANTILE
from tersely.evaluation.perplexity import (
    LOGITS_AT_ONCE,
    ROWS_AT_LEAST,
    TOKENS_PER_BATCH,
    Progress,
    body_runs_once,
    require_causal,
    undisturbed,
    vocabulary_size,
)
from tersely.evaluation.task_formats import Pair, Question, Task
from tersely.text import context_length

USUAL_CONTEXT = 2048
"""Of a model whose configuration names no limit."""


@dataclass(frozen=True)
class Request:
    """Tokens that are given, and those that are scored behind them."""

    given: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Sum of log-probabilities in nats, and whether every scored token was the likeliest."""

    log_likelihood: float
    is_greedy: bool


def measure_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """One row for each metric of a task; a figure that is not defined is absent.

    The model is left as it was.  Raises RecipeError for a choice without tokens or longer than the context,
    NumericalError for logits that are not finite.
    """
    requests = [encode(pair, tokenizer) for question in task.questions for pair in question.pairs]
    scores = iter(score(model, requests, progress, task.name))
    answers = [[next(scores) for _ in question.pairs] for question in task.questions]
    common: dict[str, Any] = {"task": task.name, "n": len(task.questions), "source": task.source, "sha256": task.sha256}
    if task.notes:
        common["notes"] = list(task.notes)
    rows = []
    for metric in task.metrics:
        row = common | {"metric": metric} | _figures(metric, task.questions, answers)
        if metric != "perplexity" and task.floor is not None:
            row["floor"] = task.floor
        rows.append(row)
    return rows


def encode(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Request:
    """Tokens of what is given and of what is scored; see the head of this file."""
    given, choice = pair
    if given.strip() == "":
        numbers, prefix = _numbers(given + choice, tokenizer, special=False), _prefix(tokenizer)
        request = Request((prefix,), numbers) if numbers[:1] != (prefix,) else Request(numbers[:1], numbers[1:])
    else:
        kept = given.rstrip()
        whole = _numbers(given + choice, tokenizer)
        before = _numbers(kept, tokenizer)
        request = Request(before, whole[len(before) :])
    if not request.scored:
        raise RecipeError(f"choice {choice[:40]!r} behind {given[-40:]!r} has no tokens of its own to score")
    return request


def score(
    model: PreTrainedModel, requests: Sequence[Request], progress: Progress | None = None, name: str = ""
) -> list[Score]:
    """Scores in the order of the requests; equal requests have the very same."""
    require_causal(model)
    context = context_length(model.config) or USUAL_CONTEXT
    for request in requests:
        if len(request.scored) > context:
            raise RecipeError(f"a choice of {len(request.scored)} tokens is beyond the model's context of {context}")
    fed = {request: (*request.given, *request.scored)[-(context + 1) :] for request in requests}
    order = sorted(fed, key=lambda request: -len(fed[request]))
    found: dict[Request, Score] = {}
    with undisturbed(model):
        while len(found) < len(order):
            longest = len(fed[order[len(found)]]) - 1
            batch = order[len(found) : len(found) + max(1, TOKENS_PER_BATCH // max(1, longest))]
            found |= dict(zip(batch, _batch(model, [fed[request] for request in batch], batch), strict=True))
            if progress is not None:
                progress(f"sequences of {name}", len(found), len(order))
    return [found[request] for request in requests]


def _batch(model: PreTrainedModel, fed: list[tuple[int, ...]], requests: list[Request]) -> list[Score]:
    longest = max(map(len, fed))
    tokens = torch.tensor([[*one, *[0] * (longest - len(one))] for one in fed])
    is_scored = torch.zeros(len(fed), longest - 1, dtype=torch.bool)  # by the position that predicts
    for row, (one, request) in enumerate(zip(fed, requests, strict=True)):
        is_scored[row, len(one) - 1 - len(request.scored) : len(one) - 1] = True
    first = int(is_scored.any(0).nonzero()[0])
    step = max(1, max(ROWS_AT_LEAST, LOGITS_AT_ONCE // vocabulary_size(model.config)) // len(fed))
    sums, greedy = torch.zeros(len(fed), dtype=torch.float64), torch.ones(len(fed), dtype=torch.bool)
    with body_runs_once(model):
        for start in range(first, longest - 1, step):
            stop = min(start + step, longest - 1)
            kept = torch.arange(start, stop)
            logits = model(input_ids=tokens[:, :-1].to(model.device), use_cache=False, logits_to_keep=kept).logits
            targets = tokens[:, start + 1 : stop + 1].to(logits.device)
            added, hit = _sums(logits, targets, is_scored[:, start:stop].to(logits.device))
            sums, greedy = sums + added, greedy & hit
    return [Score(float(total), bool(hit)) for total, hit in zip(sums, greedy, strict=True)]


def _sums(
    logits: Float[Tensor, "rows positions vocabulary"],
    targets: Int[Tensor, "rows positions"],
    is_scored: Bool[Tensor, "rows positions"],
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    if not logits[is_scored].isfinite().all():
        raise NumericalError("a logit is not finite; a wrong weight or a dtype of too little range, no score is given")
    said = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    likelihoods = said.gather(-1, targets[..., None]).squeeze(-1).double()
    hits = (said.argmax(-1) == targets) | ~is_scored
    return torch.where(is_scored, likelihoods, 0.0).sum(1).cpu(), hits.all(1).cpu()


def _figures(metric: str, questions: Sequence[Question], answers: list[list[Score]]) -> dict[str, Any]:
    if metric == "perplexity":
        values = torch.tensor([one.log_likelihood for (one,) in answers], dtype=torch.float64)
        mean, error = float(values.mean()), _error(values)
        if mean < -700:
            raise NumericalError(f"a mean score of {mean:.4g} nats has no perplexity; the model is destroyed")
        figures: dict[str, Any] = {"value": math.exp(-mean)}
        if error is not None:
            reach = NORMAL_QUANTILE * error
            interval = [math.exp(-mean - reach), math.exp(min(700.0, -mean + reach))]
            figures |= {"stderr": math.exp(-mean) * error, "interval": interval}
        return figures
    right = [_is_right(metric, question, scores) for question, scores in zip(questions, answers, strict=True)]
    values = torch.tensor(right, dtype=torch.float64)
    error = _error(values)
    figures = {"value": float(values.mean()), "interval": list(wilson(int(values.sum()), len(right)))}
    return figures if error is None else figures | {"stderr": error}


def _is_right(metric: str, question: Question, scores: list[Score]) -> bool:
    if len(scores) == 1:
        return scores[0].is_greedy
    values = [one.log_likelihood for one in scores]
    if metric == "acc_norm":
        values = [value / max(1, length) for value, length in zip(values, question.lengths, strict=True)]
    return values.index(max(values)) == question.gold


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, from how many of `count` were right."""
    z, share = NORMAL_QUANTILE, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _error(values: Float[Tensor, " questions"]) -> float | None:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def _numbers(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool = True) -> tuple[int, ...]:
    # a text that begins with BOS in so many words gets no second one
    doubled = special and text.startswith(str(tokenizer.decode([_prefix(tokenizer)])))
    return tuple(tokenizer(text, add_special_tokens=special and not doubled, verbose=False)["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    raise RecipeError("the tokenizer has neither BOS nor EOS, behind one of which a lone choice is scored")
