"""Where numbers are far larger than their neighbours: channels, tokens, projections.

Three kinds of outliers are known in language models, and each spoils another kind of quantization.

*Channels.*  A few channels of an input are large for every token; one scale for all channels is then wasted on them.
Measured per input: the largest |x| of the loudest channel over that of the median channel, and the kurtosis of all
entries (3 for a Gaussian).

*Tokens.*  A few tokens, often the first one or delimiters, carry a hidden state that is larger by orders of magnitude
("massive activations"); later attention uses them as a place to look at nothing.  Measured behind every block: the
largest norm of a token over the median norm, the share of tokens beyond `FAR` times the median, and which token it is.

*Projections.*  Massive activations arise in the input of a few linears, down projections of early and late blocks above
all.  With A the largest |x| over all tokens and m the median over tokens of the largest |x| of a token, the *spike*
of a projection is A / m, free of any scale; beyond `SPIKE` it should be kept in 16 bits where inputs are quantized
with one scale for all.  (The paper looks at the largest value itself, over depth.)  A weight spikes where the largest
entry of one row is that far above the median of the rows' largest entries: a scale for all of it is wasted likewise.
Both are what the allocator `spikes` and the method `spike_aware` go by.

Source: Sun et al., Massive Activations in Large Language Models, 2024 (arXiv 2402.17762); Maisonnave et al., Precision
Where It Matters: A Novel Spike Aware Mixed-Precision Quantization Strategy, 2025 (arXiv 2504.21553).
"""

from math import isfinite
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.diagnose.base import Row, Seen, Subject, row
from tersely.errors import NumericalError
from tersely.stats import AbsMax
from tersely.stats.peaks import weight_spike

FAR = 10.0
"""Times the median norm, beyond which a token is counted as an outlier."""

SPIKE = 30.0
"""Spike of a projection that is flagged; the paper's models have tens to thousands, where others have below ten."""


class Tokens:
    """For every token its largest |x|, the channel where that is, and its norm: shape ``[tokens, 3]``, float64."""

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._seen = [torch.zeros(0, 3, dtype=torch.float64)]

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        if not torch.isfinite(x).all():
            raise NumericalError("an input has entries that are not finite; run in bfloat16 or float32")
        x = x.double().abs()
        largest, channel = x.max(1)
        self._seen.append(torch.stack([largest, channel.double(), x.norm(dim=1)], 1).cpu())
        self.tokens += len(x)

    def merge(self, other: Self) -> None:
        self._seen += other._seen
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, "tokens 3"]:
        """Of all tokens, in the order they were seen."""
        return torch.cat(self._seen)

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.mean()}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        statistic = cls(0)
        statistic._seen, statistic.tokens = [state["seen"]], len(state["seen"])
        return statistic


class Moments:
    """Means of x, x², x³ and x⁴ over all entries, and with them the kurtosis."""

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._entries = 0

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        x = x.double()
        self._sums += torch.stack([x.pow(power).sum() for power in (1, 2, 3, 4)])
        self._entries += x.numel()
        self.tokens += len(x)

    def merge(self, other: Self) -> None:
        self._sums += other._sums.to(self._sums.device)
        self._entries += other._entries
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, " 4"]:
        return self._sums / max(self._entries, 1)

    def kurtosis(self) -> float | None:
        """E(x - μ)⁴ / σ⁴; None where nothing varies."""
        first, second, third, fourth = self.mean().tolist()
        variance = second - first**2
        if variance <= 1e-12 * second:
            return None
        return (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / variance**2

    def state(self) -> dict[str, Tensor]:
        counts = torch.tensor([self._entries, self.tokens])
        return {"sums": self._sums, "counts": counts}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        statistic = cls(0)
        statistic._sums = state["sums"].clone()
        statistic._entries, statistic.tokens = state["counts"].tolist()
        return statistic


def look(subject: Subject) -> list[Row]:
    """Outliers of every input, every projection and every block."""
    rows = []
    for seen in subject.blocks([AbsMax, Moments, Tokens], [Tokens]):
        rows += _channels(seen) + spikes(seen) + _weights(seen, subject) + _tokens(seen, subject)
    return rows


def _channels(seen: Seen) -> list[Row]:
    rows = []
    for key, stats in seen.inputs.items():
        largest = stats[AbsMax].mean()
        rows += [
            row(key, "channel peak", _ratio(largest.max(), largest.median()), "× median channel"),
            row(key, "channel", int(largest.argmax()), "index"),
            row(key, "kurtosis", stats[Moments].kurtosis()),
        ]
    return rows


def spikes(seen: Seen) -> list[Row]:
    """Of the projections of one block."""
    rows = []
    for site in seen.sites:
        read = seen.inputs[site.reads][Tokens].mean()[:, 0]
        spike = _ratio(read.max(), read.median())
        rows += [
            row(site.name, "largest input", read.max().item()),
            row(site.name, "largest output", seen.outputs[site.name][Tokens].mean()[:, 0].max().item()),
            row(site.name, "spike", spike, "× median token"),
            row(site.name, "flag", "spike" if spike is not None and spike > SPIKE else None),
        ]
    return rows


def _weights(seen: Seen, subject: Subject) -> list[Row]:
    spiky = {site.name: weight_spike(subject.weight(site)) for site in seen.sites}
    return [row(name, "weight spike", above, "× median row") for name, above in spiky.items() if isfinite(above)]


def _tokens(seen: Seen, subject: Subject) -> list[Row]:
    table = seen.outputs[seen.name][Tokens].mean()
    norm = table[:, 2]
    worst = int(norm.argmax())
    position, token = subject.token(worst)
    return [
        row(seen.name, "token peak", _ratio(norm.max(), norm.median()), "× median token"),
        row(seen.name, "outlier tokens", (norm > FAR * norm.median()).double().mean().item(), "share of tokens"),
        row(seen.name, "position", position, "in the window"),
        row(seen.name, "token", token, "number"),
        row(seen.name, "channel", int(table[worst, 1]), "index"),
    ]


def _ratio(largest: Tensor, usual: Tensor) -> float | None:
    """None where the usual value is zero: there is no scale to compare with."""
    return (largest / usual).item() if usual > 0 else None
