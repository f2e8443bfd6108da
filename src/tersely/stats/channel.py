"""Statistics per input channel: mean magnitude, mean square, largest magnitude.  All of shape ``[width]``, float64."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


class _PerChannel(ABC):
    """A vector accumulated over tokens; subclasses say what a batch adds and how two results join."""

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._value = torch.zeros(width, dtype=torch.float64, device=device)

    @abstractmethod
    def _of_batch(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, " width"]: ...

    def _join(self, first: Float[Tensor, " width"], second: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
        return first + second

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        if x.shape[0]:
            self._value = self._join(self._value, self._of_batch(x.double()))
            self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        self._value = self._join(self._value, other._value.to(self._value.device))
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, " width"]:
        return self._value / max(self.tokens, 1)

    def state(self) -> dict[str, Tensor]:
        return {"value": self._value, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        statistic = cls(0)
        statistic._value, statistic.tokens = state["value"], int(state["tokens"])
        return statistic


class AbsMean(_PerChannel):
    """Mean of |x|."""

    def _of_batch(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, " width"]:
        return x.abs().sum(0)


class Power(_PerChannel):
    """Mean of x²: the diagonal of the Gram matrix, at a fraction of its cost."""

    def _of_batch(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, " width"]:
        return x.square().sum(0)


class AbsMax(_PerChannel):
    """Largest |x| over all tokens; its `mean` is that maximum."""

    def _of_batch(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, " width"]:
        return x.abs().amax(0)

    def _join(self, first: Float[Tensor, " width"], second: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
        return torch.maximum(first, second)

    def mean(self) -> Float[Tensor, " width"]:
        return self._value
