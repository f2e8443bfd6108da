"""How far the largest number of an input stands above what is usual.

With A the largest |x| over all tokens and m the median over tokens of the largest |x| of a token, the *spike* of an
input is A / m, free of any scale.  A is what a fixed grid for all tokens has to reach, m is all that most of them need
of it.  Of a weight the rows stand in the place of tokens.

What is kept is A and how often every peak came, with peaks rounded to bfloat16, 2^15 counts whatever the number of
tokens: m is one of these, and off by one part in 500 at most.

Source: Maisonnave et al., Precision Where It Matters: A Novel Spike Aware Mixed-Precision Quantization Strategy, 2025
(arXiv 2504.21553), which looks at the largest values over depth; the ratio is ours.
"""

import math
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

POSITIVE = 2**15
"""Numbers of bfloat16 without a sign."""


class Peaks:
    """The largest |x| of every token; `mean` is [A, m], in float64."""

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._counts = torch.zeros(POSITIVE, dtype=torch.int64, device=device)

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        if not x.shape[0]:
            return
        peaks = x.abs().amax(1)
        self._largest = torch.maximum(self._largest, peaks.amax().double())
        places = peaks.to(torch.bfloat16).view(torch.int16).long() & (POSITIVE - 1)
        self._counts = self._counts + torch.bincount(places, minlength=POSITIVE)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        self._largest = torch.maximum(self._largest, other._largest.to(self._largest.device))
        self._counts = self._counts + other._counts.to(self._counts.device)
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, " 2"]:
        """[A, m]; of an even number of tokens m is the lower one of the two in the middle."""
        if not self.tokens:
            return torch.zeros(2, dtype=torch.float64, device=self._largest.device)
        place = int((self._counts.cumsum(0) < (self.tokens + 1) // 2).sum())
        usual = torch.tensor(place, dtype=torch.int16).view(torch.bfloat16).double()
        return torch.stack([self._largest, usual.to(self._largest.device)])

    def state(self) -> dict[str, Tensor]:
        return {"largest": self._largest, "counts": self._counts, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        peaks = cls(0)
        peaks._largest, peaks._counts = state["largest"].clone(), state["counts"].clone()
        peaks.tokens = int(state["tokens"])
        return peaks


def spike(largest: float, usual: float) -> float:
    """A / m; 0 where nothing ever came, infinite where usually nothing does."""
    if usual > 0:
        return largest / usual
    return math.inf if largest > 0 else 0.0


def weight_spike(weight: Float[Tensor, "out in"]) -> float:
    """The largest weight over the median of the largest ones of the rows: what a scale for all rows has to reach."""
    peaks = weight.detach().abs().amax(1).double()
    return spike(peaks.max().item(), peaks.median().item())
