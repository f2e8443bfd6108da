"""Is one model better than another, or was it the text?  Two models on the same windows, compared window by window.

Windows differ far more in how hard they are than models do in how good they are, and they are hard for both models at
once.  So the difference is taken in every window, and its scatter, not that of the losses, says how sure the mean is:

    d_w = mean loss of the first model in window w - that of the second        in nats per predicted position
    d   = mean of d_w,      s = √( Σ (d_w - d)² / (n - 1) ) / √n              the standard error of d
    ratio of perplexities = exp(d)

Two intervals of 95 % are given.  The *normal* one is d ± 1.96 s.  The *bootstrap* one draws n windows with replacement,
many times, and takes the 2.5 and 97.5 percentiles of the means; it needs no bell curve and shows where a few windows
decide.  The windows are the unit: positions within one depend on each other.  Neighbouring windows of one document do
so too, weakly, which no interval here knows of; and none knows of other texts, or of other calibration seeds.

Over several texts the mean of their means is compared, each text counting the same however long it is.  Its square
error is Σ s_t² / T², and the bootstrap draws windows within each text.

With equal windows the mean of the d_w is the difference of the logarithms of the two perplexities.  (Overlapping
windows have one that holds more predictions, the first; here it counts as one window like the others.)

Source: Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError

NORMAL_QUANTILE = 1.959963984540054
RESAMPLES = 4000
NUMBERS_AT_ONCE = 2**22
"""Drawn window numbers that are held at a time."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """The first model's loss less the second's; below zero, the first is better."""

    difference: float
    """Nats per predicted position."""
    standard_error: float
    normal: Interval
    bootstrap: Interval
    windows: int
    """Of all texts together."""

    @property
    def ratio(self) -> float:
        """Perplexity of the first model over that of the second."""
        return math.exp(self.difference)

    @property
    def ratio_interval(self) -> Interval:
        """That of the bootstrap, as ratios of perplexities."""
        return math.exp(self.bootstrap[0]), math.exp(self.bootstrap[1])

    @property
    def is_lower(self) -> bool:
        """Whether both intervals lie below zero."""
        return max(self.normal[1], self.bootstrap[1]) < 0


def paired(first: Float[Tensor, " windows"], second: Float[Tensor, " windows"], *, seed: int = 0) -> Paired:
    """Compare two models by their mean losses in each window of a text (see `window_losses`).

    The same `seed` gives the same interval.  Raises RecipeError unless both saw the same number of windows, at least
    two, and NumericalError for a loss that is not finite.
    """
    return paired_over([(first, second)], seed=seed)


def paired_over(
    texts: Sequence[tuple[Float[Tensor, " windows"], Float[Tensor, " windows"]]], *, seed: int = 0
) -> Paired:
    """As `paired`, over several texts that count the same; of each, the losses of the first model and of the second."""
    if not texts:
        raise RecipeError("models are compared on no text; give the losses of one at least")
    differences = [_differences(first, second) for first, second in texts]
    mean = sum(float(one.mean()) for one in differences) / len(differences)
    error = math.sqrt(sum(float(one.var()) / len(one) for one in differences)) / len(differences)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([_resampled_means(one, generator) for one in differences]).mean(0)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    reach = NORMAL_QUANTILE * error
    return Paired(mean, error, (mean - reach, mean + reach), (low, high), sum(len(one) for one in differences))


def _differences(first: Float[Tensor, " windows"], second: Float[Tensor, " windows"]) -> Float[Tensor, " windows"]:
    if first.shape != second.shape or first.ndim != 1:
        raise RecipeError(
            f"losses of {tuple(first.shape)} and {tuple(second.shape)} windows are no pairs; measure both models on "
            "the same windows"
        )
    if len(first) < 2:
        raise RecipeError(f"{len(first)} windows have no scatter; compare on 2 or more")
    differences = first.double().cpu() - second.double().cpu()
    if not differences.isfinite().all():
        window = int(differences.isfinite().logical_not().nonzero()[0])
        raise NumericalError(f"window {window}: a loss is not finite, and nothing can be said of the mean")
    return differences


def _resampled_means(differences: Float[Tensor, " windows"], generator: torch.Generator) -> Float[Tensor, " resamples"]:
    count = len(differences)
    at_once = max(1, NUMBERS_AT_ONCE // count)
    means = []
    for start in range(0, RESAMPLES, at_once):
        drawn = torch.randint(count, (min(at_once, RESAMPLES - start), count), generator=generator)
        means.append(differences[drawn].mean(1))
    return torch.cat(means)
