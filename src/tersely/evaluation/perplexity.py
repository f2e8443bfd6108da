"""Perplexity, defined once: how many tokens the model hesitates between, on average, when it reads a text.

    perplexity = exp( - 1/N Σ log p(token_i | tokens before it in its window) )

The formula is short; the number it gives depends on everything it does not say, and differences between published
perplexities are more often differences of protocol than of models.  Ours:

- The text is tokenised once, as a whole, without added special tokens, and cut into windows of `length` tokens.  The
  model sees one window at a time and nothing of its neighbours.
- The first token of a window has no past and is never predicted; every other one is, `length` - 1 in a window.
- `stride` is how far a window starts behind the one before.  Where it is equal to `length`, windows do not overlap.
  Where it is less, a window begins with tokens that the one before has covered; they are context, and only the last
  `stride` tokens of the window, the new ones, are predicted.  (The first window has no predecessor and predicts
  `length` - 1.)  With stride = length - 1, every token of the text but the first is predicted exactly once.
- A model that was trained with a first token (BOS) gets it in front of every window.  A window is then BOS and
  `length` - 1 tokens of text, all of them predicted; no more than `length` positions are fed in any case.  Windows
  that do not overlap are then `length` - 1 tokens of text apart.
- A last window that is not full is dropped.  A logit that is not finite, in whatever window, is an error.
- Log-softmax is taken in float32 (float64 for a model in float64), sums over positions in float64.

The mean is over positions, not over windows: with equal windows the two agree, with overlapping ones they do not.

Logits are the largest tensor of an evaluation by far: one window of 2048 tokens over a vocabulary of 128 k is one
gigabyte, for weights that may take less.  Hence the body of the model runs once for a batch, and its head is asked for
some positions at a time (`body_runs_once`, `LOGITS_AT_ONCE`).  Beyond rounding, neither that nor the batch changes a
number.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol as Interface

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tersely.errors import NumericalError, RecipeError
from tersely.text import Text, check_vocabulary, tokenise, window_length

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many units are done, and of how many."""

Figures = Callable[
    [Sequence[Float[Tensor, "windows positions vocabulary"]], Int[Tensor, "windows positions"]],
    Sequence[Float[Tensor, "windows positions"]],
]
"""From the log-probabilities of every model and the tokens that came: figures of each position."""

Recalled = dict[int, list[object]]
"""First window of a batch → what the body of a model says about the batch: its hidden states, for all positions."""

TOKENS_PER_BATCH = 4096
# Over all models together: with their log-softmax beside them 32 MB in float32, which the last cache of most processors
# holds; eight times as many take a third longer.
LOGITS_AT_ONCE = 2**22
# Unless these are fewer, since a product with the head reads all of its weights: over a vocabulary of 128 k they are
# 2^24 numbers a model.
ROWS_AT_LEAST = 128


@dataclass(frozen=True)
class Protocol:
    """All that a number depends on besides the weights.

    `text` is the source as it was given and `sha256` the checksum of its content; `length` and `stride` count tokens;
    `first_token` is the string put in front of every window, None for none; `dtype` is the model's; `windows` and
    `tokens` count what was measured, `tokens` the predicted positions only.
    """

    text: str
    sha256: str
    length: int
    stride: int
    first_token: str | None
    dtype: str
    windows: int
    tokens: int


class Fed(Interface):
    """What a model is fed of a text, window by window; `Windows`, and what `protocols` make of one."""

    @property
    def last_is_fed(self) -> bool:
        """Whether the last token of a window is fed, behind which nothing is predicted."""

    @property
    def text(self) -> Text: ...

    def __len__(self) -> int: ...

    def batches(self) -> Iterator[tuple[range, range]]: ...

    def tokens(self, numbers: range) -> Int[Tensor, "windows length"]: ...

    def name(self, number: int) -> str: ...


@dataclass(frozen=True)
class Windows:
    """A text, cut.  Made by `cut`; `len` is the number of windows."""

    text: Text
    length: int
    stride: int
    first_token: tuple[str, int] | None
    """The token in front of every window, as a string and as a number."""
    content: Int[Tensor, "windows content"]
    """Tokens of the text; a view that repeats nothing in memory, however much the windows overlap."""

    def __len__(self) -> int:
        return self.content.shape[0]

    @property
    def last_is_fed(self) -> bool:
        return True

    @property
    def new(self) -> int:
        """Predictions in each window but the first."""
        return min(self.stride, self.length - 1)

    @property
    def predicted(self) -> int:
        """Predictions in all windows."""
        return self.length - 1 + (len(self) - 1) * self.new

    def predictions(self) -> Float[Tensor, " windows"]:
        """Predictions in each window; equal in all of them unless they overlap."""
        counts = torch.full((len(self),), float(self.new), dtype=torch.float64)
        counts[0] = self.length - 1
        return counts

    def batches(self) -> Iterator[tuple[range, range]]:
        """Numbers of windows, and the positions in them (of 0 to `length` - 1) whose tokens are predicted."""
        yield range(1), range(1, self.length)
        size = max(1, TOKENS_PER_BATCH // self.length)
        for start in range(1, len(self), size):
            yield range(start, min(start + size, len(self))), range(self.length - self.new, self.length)

    def tokens(self, numbers: range) -> Int[Tensor, "windows length"]:
        """What is fed for the windows of a batch, the first token included."""
        content = self.content[numbers.start : numbers.stop]
        if self.first_token is None:
            return content.contiguous()
        return torch.cat([content.new_full((len(numbers), 1), self.first_token[1]), content], dim=1)

    def name(self, number: int) -> str:
        """How errors call a window: its number, counted from 0, and the tokens of the text it holds."""
        width = self.content.shape[1]
        start = number * min(self.stride, width)
        return f"window {number} of {self.text.source} (tokens {start} to {start + width - 1})"

    def protocol(self, model: PreTrainedModel) -> Protocol:
        return Protocol(
            text=self.text.source,
            sha256=self.text.sha256,
            length=self.length,
            stride=self.stride,
            first_token=None if self.first_token is None else self.first_token[0],
            dtype=str(model.dtype).removeprefix("torch."),
            windows=len(self),
            tokens=self.predicted,
        )


def cut(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    length: int | None = None,
    stride: int | None = None,
    first_token: bool = False,
    limit: int | None = None,
) -> Windows:
    """Tokenise a text and cut it into windows, as the head of this file defines them.

    `length` is in tokens (default: `text.window_length`), `stride` too (default: `length`).  `first_token` asks for BOS
    in front of every window.  `limit` keeps the first so many windows.

    Raises RecipeError for a length that is beyond the model's context or below 2, a stride that is not within 1 and
    the length, a limit below 1, a tokenizer without BOS where one is wanted, one that makes tokens the model does not
    know, and a text that does not fill one window.
    """
    length = window_length(config, length)
    stride = length if stride is None else stride
    _check_geometry(length, stride, limit)
    first = _first_token(tokenizer) if first_token else None
    tokens = tokenise(text.content, tokenizer)
    width = length if first is None else length - 1
    if len(tokens) < width:
        raise RecipeError(
            f"text {text.source} has {len(tokens)} tokens, one window takes {width}; "
            "give a longer text or a smaller length"
        )
    check_vocabulary(tokens, config)
    content = tokens.unfold(0, width, min(stride, width))[:limit]
    return Windows(text, length, stride, first, content)


def measure_perplexity(model: PreTrainedModel, windows: Windows, progress: Progress | None = None) -> float:
    """Perplexity of `model` on `windows`; see the head of this file.

    Raises RecipeError for a model that predicts no next token, NumericalError for one whose logits are not finite.
    """
    (loss,) = mean_over_positions([model], windows, only_loss, progress)
    return perplexity_of(loss)


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats.  Raises NumericalError where that exceeds what a float64 can hold."""
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise NumericalError(f"a mean loss of {loss:.4g} nats has no perplexity; the model is destroyed") from error


def loss_of(
    log_probabilities: Float[Tensor, "windows positions vocabulary"], tokens: Int[Tensor, "windows positions"]
) -> Float[Tensor, "windows positions"]:
    """Cross entropy in nats: minus the log-probability of the token that came."""
    return -log_probabilities.gather(-1, tokens[..., None]).squeeze(-1)


def window_losses(
    model: PreTrainedModel, windows: Windows, progress: Progress | None = None
) -> Float[Tensor, " windows"]:
    """The mean loss of each window in nats per predicted position, float64: what `paired` compares models by.

    Weighted by `Windows.predictions`, their mean is the logarithm of the perplexity that `measure_perplexity` gives.
    Raises as `measure_perplexity` does.
    """
    return sums_by_window([model], windows, only_loss, progress)[0] / windows.predictions()


def mean_over_positions(
    models: Sequence[PreTrainedModel],
    windows: Windows,
    figures: Figures,
    progress: Progress | None = None,
    recalled: Sequence[Recalled | None] = (),
) -> list[float]:
    """Show all windows to all models, once, and average what `figures` says about each predicted position.

    `models` share a vocabulary.  `figures` is called with the log-probabilities of each (in the order of `models`, on
    the device of the first) and the tokens that came, for some positions of some windows at a time.  The models are
    left as they were.

    `recalled` holds for each model what its body has said about these very windows before, as far as it has, and is
    filled where it has not; None for a model that is not asked again.

    Raises RecipeError for a model that predicts no next token, NumericalError, which names the window, for a logit or a
    figure that is not finite.
    """
    return (sums_by_window(models, windows, figures, progress, recalled).sum(1) / windows.predicted).tolist()


def sums_by_window(
    models: Sequence[PreTrainedModel],
    windows: Fed,
    figures: Figures,
    progress: Progress | None = None,
    recalled: Sequence[Recalled | None] = (),
) -> Float[Tensor, "figures windows"]:
    """As `mean_over_positions`: sums over the predicted positions of each window instead, float64, on the CPU."""
    for model in models:
        require_causal(model)
    sums: list[Tensor] = []
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        for numbers, positions in windows.batches():
            known = [None if kept is None else kept.setdefault(numbers.start, []) for kept in recalled]
            sums.append(_sums_of_batch(models, windows, numbers, positions, figures, known))
            if progress is not None:
                progress(f"windows of {windows.text.source}", numbers.stop, len(windows))
    return torch.cat(sums, dim=1)


def require_causal(model: PreTrainedModel) -> None:
    """Raise RecipeError unless the model predicts the next token from those before it, and from nothing else."""
    config, name = model.config, type(model).__name__
    if config.is_encoder_decoder:
        raise RecipeError(f"{name} is an encoder and a decoder; perplexity is defined for decoders, use tasks instead")
    # An encoder's family can be asked to be a decoder, and only its configuration says whether it was.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise RecipeError(
            f"{name} is an encoder: its positions see the tokens they would have to predict, so that it has no causal "
            "perplexity; evaluate it on tasks instead"
        )
    if not model.can_generate():
        raise RecipeError(
            f"{name} has no head that predicts tokens; open the folder with AutoModelForCausalLM, or use tasks instead"
        )


def vocabulary_size(config: PreTrainedConfig) -> int:
    """Logits a position."""
    return config.get_text_config().vocab_size


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Within: evaluation mode, no gradients.  Afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # not inference_mode: tables that a model builds on first use would be unfit for training ever after
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def body_runs_once(model: PreTrainedModel, remembered: list[object] | None = None) -> Iterator[None]:
    """Within, the body of the model computes its output on the first call and repeats it on every later one.

    A second call of the model thus costs its head only, with all that its family does there (scaled or capped logits).
    `remembered` holds that output already, or is empty and will hold it.
    """
    body = model.get_decoder()
    if body is model:  # no body to tell from the head: every call is a whole one
        yield
        return
    forward, shadowed = body.forward, vars(body).get("forward")
    remembered = [] if remembered is None else remembered

    def first_answer(*arguments: object, **named: object) -> object:
        if not remembered:
            remembered.append(forward(*arguments, **named))
        return remembered[0]

    body.forward = first_answer
    try:
        yield
    finally:
        if shadowed is None:
            del body.forward
        else:
            body.forward = shadowed


def only_loss(
    log_probabilities: Sequence[Float[Tensor, "windows positions vocabulary"]], tokens: Int[Tensor, "windows positions"]
) -> Sequence[Float[Tensor, "windows positions"]]:
    """The one figure of a perplexity."""
    return (loss_of(log_probabilities[0], tokens),)


def _sums_of_batch(
    models: Sequence[PreTrainedModel],
    windows: Fed,
    numbers: range,
    positions: range,
    figures: Figures,
    known: Sequence[list[object] | None],
) -> Float[Tensor, "figures windows"]:
    tokens = windows.tokens(numbers)
    rows = max(ROWS_AT_LEAST, LOGITS_AT_ONCE // (len(models) * vocabulary_size(models[0].config)))
    step = max(1, rows // len(numbers))
    sums: list[Tensor] = []
    with ExitStack() as stack:
        for model, remembered in zip_longest(models, known):
            stack.enter_context(body_runs_once(model, remembered))
        for start in range(positions.start, positions.stop, step):
            piece = range(start, min(start + step, positions.stop))
            log_probabilities = [_log_probabilities(model, tokens, piece, windows, numbers) for model in models]
            device = log_probabilities[0].device
            targets = tokens[:, piece.start : piece.stop].to(device)
            said = figures([one.to(device) for one in log_probabilities], targets)
            values = torch.stack([figure.double() for figure in said])
            _require_finite(values.isfinite().all(0).all(-1), windows, numbers, "a loss")
            sums.append(values.sum(2).cpu())
    return torch.stack(sums).sum(0)


def _log_probabilities(
    model: PreTrainedModel, tokens: Int[Tensor, "windows length"], positions: range, windows: Fed, numbers: range
) -> Float[Tensor, "windows positions vocabulary"]:
    """What the model expects at `positions`: the log-softmax of its logits one position earlier."""
    # an index on the CPU serves wherever the last block lies, should the model be spread over devices
    earlier = torch.arange(positions.start - 1, positions.stop - 1)
    fed = tokens if windows.last_is_fed else tokens[:, :-1]
    logits = model(input_ids=fed.to(model.device), use_cache=False, logits_to_keep=earlier).logits
    if logits.shape[1] != len(positions):
        raise RecipeError(
            f"{type(model).__name__} gave logits of {logits.shape[1]} positions where {len(positions)} were asked for; "
            "its family does not know `logits_to_keep`, without which memory is not bounded"
        )
    # a sum is finite only if all its terms are: no mask of the logits' size is needed
    total = logits.sum((1, 2), dtype=torch.promote_types(logits.dtype, torch.float32))
    _require_finite(total.isfinite(), windows, numbers, f"a logit of {type(model).__name__}")
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _require_finite(finite: Tensor, windows: Fed, numbers: range, what: str) -> None:
    """Raise for the first window whose entry in `finite`, shape ``[windows]``, is false."""
    if not finite.all():
        number = numbers.start + int(finite.logical_not().nonzero()[0])
        raise NumericalError(
            f"{windows.name(number)}: {what} is not finite; a wrong weight or a dtype of too little range, no number "
            "is given for the text"
        )


def _check_geometry(length: int, stride: int, limit: int | None) -> None:
    if not 1 <= stride <= length:
        raise RecipeError(
            f"stride {stride} is not within 1 and the length {length}; tokens would be skipped or stay put"
        )
    if limit is not None and limit < 1:
        raise RecipeError(f"{limit} windows were asked for; give at least 1, or nothing for all of them")


def _first_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    if tokenizer.bos_token is None:
        raise RecipeError("a first token was asked for and the tokenizer has none (bos_token); measure without it")
    return tokenizer.bos_token, tokenizer.bos_token_id
