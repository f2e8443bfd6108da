"""Which windows a step sees.

Every epoch is a permutation of the windows, drawn from the seed and the number of the epoch; the epochs stand one
behind the other, and step s takes the next `batch` of them.  So a batch depends on the seed and on the step alone: a
run that was stopped needs no state to go on with the batch that an unbroken one would have seen.
"""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

from tersely.errors import RecipeError


def seed_of(*parts: int | str) -> int:
    """One seed from several: those of other parts are unrelated, however close the numbers are."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # below 2^63, which every generator takes


class Batches:
    """The windows' numbers, step by step."""

    def __init__(self, windows: int, batch: int, seed: int) -> None:
        self._windows = windows
        self._batch = batch
        self._seed = seed
        self._drawn: tuple[int, Tensor] = (-1, torch.empty(0))

    def at(self, step: int) -> Int[Tensor, " batch"]:
        """Numbers of the windows that step `step` (from 0) sees."""
        places = range(step * self._batch, (step + 1) * self._batch)
        return torch.stack([self._epoch(place // self._windows)[place % self._windows] for place in places])

    def _epoch(self, epoch: int) -> Int[Tensor, " windows"]:
        if self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self._seed, "epoch", epoch))
            self._drawn = (epoch, torch.randperm(self._windows, generator=generator))
        return self._drawn[1]


def hold_out(
    windows: Int[Tensor, "windows length"], count: int
) -> tuple[Int[Tensor, "rest length"], Int[Tensor, "count length"]]:
    """Divide windows into those to train on and `count` to measure on, which lie evenly over the text.

    Raises RecipeError where that would leave fewer windows to train on than to measure on.
    """
    total = len(windows)
    if 2 * count > total:
        raise RecipeError(
            f"{count} of {total} windows are to be held out, more than half; give more text, or hold out fewer"
        )
    held = torch.zeros(total, dtype=torch.bool)
    held[[(2 * number + 1) * total // (2 * count) for number in range(count)]] = True
    return windows[~held], windows[held]
