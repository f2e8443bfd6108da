"""What a model predicts, body and head apart.

The body of a model runs once for a batch; its head is asked for some positions at a time, for a hidden state of former
times too.  So a few distributions of some positions are all that is held of any, however large the vocabulary is.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from tersely.calibrate import TOKENS_AT_ONCE
from tersely.errors import RecipeError

LOGITS_AT_ONCE = 2**24


class Predictions:
    """Those of a causal model as it is at the time."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def batches(self, windows: Tensor) -> tuple[Tensor, ...]:
        """Windows ``[samples, length]`` in rows that run together, on the model's device."""
        return windows.to(self._model.device).split(max(1, TOKENS_AT_ONCE // windows.shape[1]))

    @torch.no_grad()
    def body(self, rows: Tensor) -> Any:
        """What the body returns."""
        said: list[Any] = []
        body = self._model.get_decoder()
        hook = body.register_forward_hook(lambda module, read, out: said.append(out))
        try:
            self._model(input_ids=rows, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        return said[0]

    def heads(self, rows: Tensor, said: Any, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions from `first` to the last but one, and the logits there of what the body has said; some at a
        time."""
        length = rows.shape[1]
        step = max(1, LOGITS_AT_ONCE // (len(rows) * self._model.config.get_text_config().vocab_size))
        for start in range(first, length - 1, step):
            positions = torch.arange(start, min(start + step, length - 1))
            yield positions, self._logits(rows, positions, said)

    def loss(self, batches: Sequence[Tensor]) -> float:
        """The mean cross entropy of the next token, nats."""
        losses = []
        for rows in batches:
            for positions, logits in self.heads(rows, self.body(rows)):
                came = rows[:, positions.to(rows.device) + 1, None]
                losses.append(-logits.log_softmax(-1).gather(-1, came).flatten())
        return torch.cat(losses).double().mean().item()

    @torch.no_grad()
    def _logits(self, rows: Tensor, positions: Tensor, said: Any) -> Tensor:
        """The logits at some positions, from what the body has said: float32 at least."""
        with _saying(self._model, said):
            logits: Tensor = self._model(input_ids=rows, use_cache=False, logits_to_keep=positions).logits
        if logits.shape[1] != len(positions):
            raise RecipeError(
                f"{type(self._model).__name__} gave logits of {logits.shape[1]} positions where {len(positions)} were "
                "asked for; its family does not know `logits_to_keep`, and what a step wants of its predictions cannot "
                "be measured"
            )
        return logits if logits.dtype == torch.float64 else logits.float()


def divergence(
    batches: Sequence[Tensor],
    dense: tuple[Predictions, Sequence[Any]],
    other: tuple[Predictions, Iterable[Any]],
    *,
    temperature: float = 1.0,
    skipped: int | None = None,
) -> float:
    """Σ p log(p / q), nats, mean over positions; p and q are what two models predict from what their bodies have said
    of each batch, at a temperature.  The first one in so many parts of every window does not count."""
    found = []
    for rows, before, after in zip(batches, dense[1], other[1], strict=True):
        first = rows.shape[1] // skipped if skipped else 0
        pairs = zip(dense[0].heads(rows, before, first), other[0].heads(rows, after, first), strict=True)
        for logits in ((of_dense[1], of_other[1]) for of_dense, of_other in pairs):
            p, q = ((of_model / temperature).log_softmax(-1) for of_model in logits)
            # torch's first argument is the approximation
            found.append(kl_div(q, p, reduction="none", log_target=True).sum(-1, dtype=torch.float64).flatten())
    return torch.cat(found).mean().item()


@contextmanager
def _saying(model: Any, said: Any) -> Iterator[None]:
    """Within, the body of the model answers at once, so that a call costs the head alone."""
    body = model.get_decoder()
    if body is model:
        raise RecipeError(
            f"{type(model).__name__} has no body apart from its head, and what a step wants of its predictions cannot "
            "be measured"
        )
    body.forward = lambda *arguments, **named: said
    try:
        yield
    finally:
        del body.forward
