"""What gradients of the loss look like: how much the model minds an error in a linear's output, or in its weight.

Let g = ∂L/∂y be the gradient, at one token, of the loss L of its window in the output y of a linear, and D = ∂L/∂W =
Σ g xᵀ over the tokens of a window that in its weight.  To second order, with the squares of gradients in the place of
the Hessian (the empirical Fisher information), a change Δ of the weight raises the loss by

    ½ tr(E[g gᵀ] Δ E[x xᵀ] Δᵀ)   per token,  if gradients and inputs are independent   (Martens and Grosse)
    ½ Σᵢⱼ E[Dᵢⱼ²] Δᵢⱼ²           per window, if the entries of the weight are

so these two expectations are what is gathered, the second one as its mean over the rows of a weight: one number per
input channel.  The square of a gradient that is summed over a batch is something else, and much of it cancels; hence
one window at a time.

`DiagonalFisher` keeps the entries apart, out · in numbers for every linear.

To first order the same change moves the loss by ⟨E[D], Δ⟩, up or down.  On the text that a model was trained on that is
nearly nothing for every Δ; over a few windows of it, or on another text, it is not.

Source: Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015, section 3
(arXiv 1503.05671).
"""

from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.stats.base import Keyed
from tersely.stats.channel import Power
from tersely.stats.gram import Gram


class OutputGram(Gram):
    """Sum of g gᵀ, shape ``[out, out]``: the second moments of the gradient in a linear's output."""

    keyed: ClassVar[Keyed] = "output"


class Fisher(Power):
    """Mean square of the gradient in a weight per input channel, ``[in]``, over its rows and over windows."""

    keyed: ClassVar[Keyed] = "weight"


class DiagonalFisher(Power):
    """E[D²] of every entry, as a gradient of the mean loss of a window: ``[out * in]``, a weight row by row.  Of one
    window it is the square of that window's gradient."""

    keyed: ClassVar[Keyed] = "flat"


class MeanGradient:
    """E[D] / (tokens that a window predicts), the gradient of the mean loss: ``[out * in]``, a weight row by row."""

    keyed: ClassVar[Keyed] = "flat"

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "windows width"]) -> None:
        self._sum += x.sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, " width"]:
        return self._sum / max(self.tokens, 1)

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        gradient = cls(0)
        gradient._sum, gradient.tokens = state["sum"].clone(), int(state["tokens"])
        return gradient
