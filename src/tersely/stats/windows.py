"""What an input looks like window by window: a sample of the windows, each as a triangular factor.

Some methods ask how a linear answers to one sequence at a time.  With X (tokens x width) the input of a window, all
that any weight can make of it, Y = X Wᵀ, has the singular values and right singular vectors of R Wᵀ, where X = Q R: so
R is kept, which has min(tokens, width) rows, and neither tokens nor weight need to be known.

R cannot be added up, so what is kept is bounded: `KEPT` windows, KEPT · min(tokens, width) · width numbers in float32
(1 GB for an input of 4096 channels in windows of 2048 tokens, one block at a time).  Which ones does not depend on the
order in which they came, nor on who saw them: every window is given a number made of its own content, and the smallest
numbers stay.  Windows are therefore a random sample without random numbers, and two samples merge into the one that a
single observer would have.
"""

import hashlib
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

KEPT = 32
"""Windows."""


class WindowFactors:
    """R of a sample of windows; each `update` is one window."""

    by_window: ClassVar[bool] = True

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._width = width
        self._device = device
        self._sample: list[tuple[int, int, Tensor]] = []
        """Number, tokens and R of every window kept, by rising numbers."""

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        if not x.shape[0]:
            return
        x = x if x.dtype == torch.float64 else x.float()
        number = _number_of(x)
        self.tokens += x.shape[0]
        if len(self._sample) < KEPT or number < self._sample[-1][0]:
            # decomposed in float64: what is rounded in the end is R alone
            factor = torch.linalg.qr(x.double(), mode="r").R if x.shape[0] > x.shape[1] else x
            self._keep([(number, x.shape[0], factor.to(x.dtype, copy=True).contiguous())])

    def merge(self, other: Self) -> None:
        self._keep([(number, tokens, factor.to(self._device)) for number, tokens, factor in other._sample])
        self.tokens += other.tokens

    def factors(self) -> list[Float[Tensor, "rows width"]]:
        """R of every window in the sample, float64, in an order that does not depend on how they came."""
        return [factor.double() for _, _, factor in self._sample]

    def mean(self) -> Float[Tensor, "width width"]:
        """E[x xᵀ] over the sample."""
        total = torch.zeros(self._width, self._width, dtype=torch.float64, device=self._device)
        for factor in self.factors():
            total += factor.T @ factor
        return total / max(sum(tokens for _, tokens, _ in self._sample), 1)

    def state(self) -> dict[str, Tensor]:
        empty = torch.zeros(0, self._width, device=self._device)
        return {
            "factors": torch.cat([factor for _, _, factor in self._sample]) if self._sample else empty,
            "rows": torch.tensor([len(factor) for _, _, factor in self._sample], dtype=torch.int64),
            "numbers": torch.tensor([number for number, _, _ in self._sample], dtype=torch.int64),
            "lengths": torch.tensor([tokens for _, tokens, _ in self._sample], dtype=torch.int64),
            "tokens": torch.tensor(self.tokens),
        }

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        windows = cls(state["factors"].shape[1], str(state["factors"].device))
        windows.tokens = int(state["tokens"])
        parts = state["factors"].split(state["rows"].tolist())
        of_window = zip(state["numbers"].tolist(), state["lengths"].tolist(), parts, strict=True)
        windows._sample = [(number, tokens, factor.clone()) for number, tokens, factor in of_window]
        return windows

    def _keep(self, more: list[tuple[int, int, Tensor]]) -> None:
        self._sample = sorted([*self._sample, *more], key=lambda window: window[0])[:KEPT]


def _number_of(x: Float[Tensor, "tokens width"]) -> int:
    content = x.detach().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1  # 63 bits: what an int64 holds
