"""How far a compressed model has moved from the dense one it was made from.

Perplexity asks how well a model predicts a text; a compressed model can gain on some tokens what it loses on others,
and fine-tuning on similar text can hide any damage.  Agreement asks how much of the *model* is left, whatever the text
says, and takes every position's whole distribution for evidence where perplexity takes one token:

    KL   = 1/N Σ_i Σ_v p_dense(v | i) ( log p_dense(v | i) - log p_model(v | i) )      in nats per predicted position
    top1 = 1/N Σ_i [ argmax p_dense(. | i) = argmax p_model(. | i) ]

KL(dense ‖ model) is the expected number of nats lost by predicting with the model what the dense one would have said.
It is zero only if nothing has changed, and it is far less noisy than a difference of two perplexities: the same few
windows tell smaller changes apart.  Both models see each window once; perplexities are taken on the way, from the same
log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tersely.errors import RecipeError
from tersely.evaluation.perplexity import (
    Progress,
    Recalled,
    Windows,
    loss_of,
    perplexity_of,
    require_causal,
    sums_by_window,
    vocabulary_size,
)


@dataclass(frozen=True)
class Agreement:
    """`kl` is in nats per predicted position, `top1` a fraction of the predicted positions."""

    perplexity: float
    dense_perplexity: float
    kl: float
    top1: float


def measure_agreement(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Windows,
    progress: Progress | None = None,
    recalled: Recalled | None = None,
) -> Agreement:
    """Compare `model` with the `dense` one it was made from, on `windows` of text.

    `recalled`: what the body of `dense` says about these windows, filled on the first call and read on later ones, for
    whoever compares many models with it.  The models may live on different devices; both stay there.  Raises
    RecipeError as `require_comparable` does, NumericalError for logits that are not finite.
    """
    return measure_windows(model, dense, windows, progress, recalled)[0]


def measure_windows(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Windows,
    progress: Progress | None = None,
    recalled: Recalled | None = None,
) -> tuple[Agreement, Float[Tensor, " windows"]]:
    """As `measure_agreement`, and the losses of `model` as `window_losses` has them, from the same pass."""
    require_comparable(model, dense)
    sums = sums_by_window([model, dense], windows, compare, progress, [None, recalled])
    loss, dense_loss, divergence, agreeing = (sums.sum(1) / windows.predicted).tolist()
    agreement = Agreement(
        perplexity=perplexity_of(loss), dense_perplexity=perplexity_of(dense_loss), kl=divergence, top1=agreeing
    )
    return agreement, sums[0] / windows.predictions()


def require_comparable(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise RecipeError where dtypes or vocabularies differ, and unless both models predict the next token."""
    require_causal(model)
    require_causal(dense)
    if model.dtype != dense.dtype:
        raise RecipeError(
            f"the model is in {model.dtype}, the dense one in {dense.dtype}, and their numbers must share a protocol; "
            "open both in the same dtype"
        )
    sizes = vocabulary_size(model.config), vocabulary_size(dense.config)
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"the model knows {sizes[0]} tokens, the dense one {sizes[1]}, and they are compared token by token; give "
            "the dense model that this one was made from"
        )


def compare(
    log_probabilities: Sequence[Float[Tensor, "windows positions vocabulary"]], tokens: Int[Tensor, "windows positions"]
) -> Sequence[Float[Tensor, "windows positions"]]:
    """The figures of an agreement: loss, dense loss, KL divergence, whether the likeliest token is the same."""
    model, dense = log_probabilities
    # four times as fast as `kl_div` with its sum in float64, and within 1e-8 of it
    divergence = torch.linalg.vecdot(dense.exp(), dense - model)
    agreeing = (model.argmax(-1) == dense.argmax(-1)).float()
    return loss_of(model, tokens), loss_of(dense, tokens), divergence, agreeing
