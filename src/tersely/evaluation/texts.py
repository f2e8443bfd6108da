"""What is said of one text: perplexity with its interval, and how far the model is from the dense one.

A number without an interval invites belief in its last digit.  The windows are the sample.  With c_w the weight of
window w's sum of losses s_w and a_w its share of what the mean is over (Σ a_w = 1), the mean is Λ = Σ c_w s_w, and

    s² = n / (n - 1) · Σ (c_w s_w - Λ a_w)²            Λ ± 1.96 s

is the usual error of a ratio of two sums, that of a mean where windows are equal.  The interval of the perplexity is
the exponential of it, and says how far another text of the same kind and length might lead.  It does *not* say whether
two models differ: both have read the same windows, and their difference scatters far less than either.  For that the
ratio to the dense model has an interval of its own, from the pairs (see `paired`), wherever the number is a mean over
windows.

Source: Cochran, Sampling Techniques, 1977, sections 2.4 and 6.4.
"""

import math
import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tersely.evaluation.agreement import compare
from tersely.evaluation.paired import NORMAL_QUANTILE, paired
from tersely.evaluation.passages import Passages
from tersely.evaluation.perplexity import (
    Figures,
    Progress,
    Windows,
    only_loss,
    perplexity_of,
    sums_by_window,
)

Interval = tuple[float, float]
LARGEST_LOSS = math.log(sys.float_info.max)


def measure_text(
    model: PreTrainedModel,
    against: PreTrainedModel | None,
    fed: Windows | Passages,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of `model`, and its agreement with the dense model `against`, if there is one; with intervals.

    KL divergence and agreement of the likeliest token are means over the predicted tokens, whatever the protocol makes
    of the losses.  Raises NumericalError for logits that are not finite.
    """
    models = [model] if against is None else [model, against]
    figures = _uncounted(only_loss if against is None else compare, fed)
    sums = sums_by_window(models, fed, figures, progress)
    counts = fed.predictions()
    weights, shares = _weights_and_shares(fed, counts)
    loss = _mean(sums[0], weights, fed)
    said: dict[str, Any] = {"perplexity": perplexity_of(loss)}
    if isinstance(fed, Passages) and fed.protocol.reduction == "words":
        said |= _by_bytes(loss, fed)
    if against is not None:
        token_weights = torch.full_like(counts, 1 / float(counts.sum()))
        dense_loss = _mean(sums[1], weights, fed)
        divergence, agreeing = (_mean(sum_, token_weights, fed) for sum_ in sums[2:])
        said |= {"dense_perplexity": perplexity_of(dense_loss), "kl": divergence, "top1": agreeing}
    if len(fed) < 2:
        return said
    interval = _interval(sums[0], weights, shares)
    if interval[1] < LARGEST_LOSS:  # else it has no end that can be written
        said["perplexity_interval"] = perplexity_of(interval[0]), perplexity_of(interval[1])
    if against is not None:
        said["kl_interval"] = _interval(sums[2], token_weights, counts / counts.sum())
        if torch.allclose(weights * counts, torch.full_like(counts, 1 / len(counts)), rtol=1e-9):
            said["perplexity_ratio_interval"] = paired(sums[0] / counts, sums[1] / counts).ratio_interval
    return {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}


def _uncounted(figures: Figures, fed: Windows | Passages) -> Figures:
    """As `figures`, with zeros where a protocol does not count the target."""
    ignored = fed.ignored if isinstance(fed, Passages) else None
    if ignored is None:
        return figures
    return lambda said, tokens: [figure * (tokens != ignored) for figure in figures(said, tokens)]


def _weights_and_shares(
    fed: Windows | Passages, counts: Float[Tensor, " windows"]
) -> tuple[Float[Tensor, " windows"], Float[Tensor, " windows"]]:
    if isinstance(fed, Windows) or fed.protocol.reduction in ("tokens", "words"):
        weights = torch.full_like(counts, 1 / float(counts.sum())) if isinstance(fed, Windows) else fed.weights
        return weights, counts / counts.sum()
    return fed.weights, torch.full_like(counts, 1 / len(counts))


def _mean(sums: Float[Tensor, " windows"], weights: Float[Tensor, " windows"], fed: Windows | Passages) -> float:
    if isinstance(fed, Windows):  # the very arithmetic of `mean_over_positions`
        return float(sums.sum() / fed.predicted)
    return float((weights * sums).sum())


def _interval(
    sums: Float[Tensor, " windows"], weights: Float[Tensor, " windows"], shares: Float[Tensor, " windows"]
) -> Interval:
    mean, count = float((weights * sums).sum()), len(sums)
    left = weights * sums - mean * shares
    reach = NORMAL_QUANTILE * math.sqrt(count / (count - 1) * float(left.square().sum()))
    return mean - reach, mean + reach


def _by_bytes(loss: float, fed: Passages) -> dict[str, float]:
    assert fed.words is not None and fed.content_bytes is not None  # what words are counted of has bytes
    nats = loss * fed.words / fed.content_bytes
    return {"byte_perplexity": math.exp(nats), "bits_per_byte": nats / math.log(2)}
