"""Second moments between two versions of an input: what the dense model feeds a linear, and what it really gets.

Behind compressed blocks a linear reads x̂ where the dense model would have fed it x.  To give back the dense output from
the shifted input, E[(x - x̂) x̂ᵀ] is needed beside E[x̂ x̂ᵀ], which `Gram` holds; E[x xᵀ], which comes along, says how
much energy the dense output had.

The difference is taken before the product, not after it: E[x x̂ᵀ] - E[x̂ x̂ᵀ] is rounding alone where nothing has been
shifted, and mostly rounding beside a loud channel.  The inverse that follows would make a weight of it.
"""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.stats.gram import add_moment, mean_moment


class Cross:
    """Sums of (x - x̂) x̂ᵀ and x xᵀ, each ``[width, width]``, float64; products are formed as in `Gram`."""

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._shift = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._dense = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        """Rows that have not been shifted."""
        add_moment(self._dense, x if x.dtype == torch.float64 else x.float())
        self.tokens += x.shape[0]

    def update_pair(self, x: Float[Tensor, "tokens width"], dense: Float[Tensor, "tokens width"]) -> None:
        """`x` is what was read, `dense` what the dense model would have read, token by token."""
        x, dense = (t if t.dtype == torch.float64 else t.float() for t in (x, dense))
        self._shift += (dense - x).T @ x
        add_moment(self._dense, dense)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        self._shift += other._shift.to(self._shift.device)
        self._dense += other._dense.to(self._dense.device)
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, "width width"]:
        """E[(x - x̂) x̂ᵀ]: zero, exactly, where nothing has been shifted."""
        return self._shift / max(self.tokens, 1)

    def dense(self) -> Float[Tensor, "width width"]:
        """E[x xᵀ]."""
        return mean_moment(self._dense, self.tokens)

    def state(self) -> dict[str, Tensor]:
        return {"shift": self._shift, "dense": self._dense, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        cross = cls(0)
        cross._shift, cross._dense = state["shift"].clone(), state["dense"].clone()
        cross.tokens = int(state["tokens"])
        return cross
