"""How far the residual stream has drifted from the dense model's, seen by what a linear reads.

A linear that writes to the residual stream adds W x to h, whatever h is by then.  Behind compressed linears the stream
is ĥ, the input x̂, and W' x̂ has to make up for h - ĥ as far as x̂ knows of it: that is what E[(h - ĥ) x̂ᵀ] says.  Without
a difference between two streams there is no such thing, and the dense model's sweep does not gather it.
"""

from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor


class Drift:
    """Sum of (h - ĥ) x̂ᵀ, ``[stream, width]``, float64; products are formed as in `Gram`.  It has no rows as long as
    no stream was seen."""

    of_shift: ClassVar[bool] = True

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(0, width, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        """Rows behind which the stream is the dense model's."""
        self.tokens += x.shape[0]

    def update_drift(self, x: Float[Tensor, "tokens width"], drift: Float[Tensor, "tokens stream"]) -> None:
        """`x` is what was read, `drift` how far the dense model's stream is from the one that it is added to."""
        x, drift = (t if t.dtype == torch.float64 else t.float() for t in (x, drift))
        self._add((drift.T @ x).double())
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        if len(other._sum):
            self._add(other._sum.to(self._sum.device))
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, "stream width"]:
        """E[(h - ĥ) x̂ᵀ]."""
        return self._sum / max(self.tokens, 1)

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        drift = cls(0)
        drift._sum, drift.tokens = state["sum"].clone(), int(state["tokens"])
        return drift

    def _add(self, moment: Float[Tensor, "stream width"]) -> None:
        self._sum = self._sum + moment if len(self._sum) else moment
