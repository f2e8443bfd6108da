"""Second moments of an input: X Xᵀ over tokens.

Products are formed in float32 (float64 for float64 inputs) batch by batch and added up in float64.  The sum is where
long calibration loses digits; a single product of a few thousand tokens is off by a few 1e-7 of √(Gᵢᵢ Gⱼⱼ).
Massive activations make the matrix ill-conditioned (1e10 and more): factorise it in float64, never in less.
"""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


class Gram:
    """Sum of x xᵀ, shape ``[width, width]``, float64."""

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        self._sum += x.T @ x
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, "width width"]:
        return self._sum / max(self.tokens, 1)

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        gram = cls(0)
        gram._sum, gram.tokens = state["sum"].clone(), int(state["tokens"])
        return gram
