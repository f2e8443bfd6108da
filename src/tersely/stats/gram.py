"""Second moments of an input: X Xᵀ over tokens.

Products are formed in float32 (float64 for float64 inputs) batch by batch and added up in float64.  The sum is where
long calibration loses digits; a single product of a few thousand tokens is off by a few 1e-7 of √(Gᵢᵢ Gⱼⱼ).  On a
processor only the half below the diagonal is multiplied, in strips, and mirrored when somebody asks.
Massive activations make the matrix ill-conditioned (1e10 and more): factorise it in float64, never in less.

`BucketGram` is that of averaged windows, X̄ X̄ᵀ with X̄ the element-wise mean of `BUCKET` windows, token position by token
position.  AdaSVD averages so in order to hold few tokens; a Gram matrix holds none, and has no need of it.  It is
another matrix: with x̄ = m + noise / √BUCKET, what differs from window to window shrinks by BUCKET, and what all have in
common at a position is all that stays.
"""

from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

BUCKET = 32
"""Windows that are averaged; the order of the paper's."""
STRIPS = 8
NARROWEST, WIDEST = 64, 256
"""Strips of a Gram matrix, and bounds on the columns of one: their products with all columns before them are formed at
once.  Narrower strips multiply less and do it slower."""


def add_moment(total: Float[Tensor, "width width"], x: Float[Tensor, "tokens width"]) -> None:
    """Add xᵀ x, formed in the dtype of x, to a sum that is only right on the diagonal and below."""
    width = x.shape[1]
    strip = width if x.is_cuda else min(max(width // STRIPS, NARROWEST), WIDEST)  # a graphics card wants one product
    for start in range(0, width, strip):
        end = min(start + strip, width)
        total[start:end, :end] += x[:, start:end].T @ x[:, :end]


def mean_moment(total: Float[Tensor, "width width"], count: int) -> Float[Tensor, "width width"]:
    """Of such a sum over `count` rows; zero before the first row."""
    mean = total / max(count, 1)
    for start in range(0, len(mean), WIDEST):  # no third matrix of that size
        end = min(start + WIDEST, len(mean))
        own = mean[start:end, start:end]
        own.copy_(own.tril() + own.tril(-1).T)
        mean[:start, start:end] = mean[start:end, :start].T
    return mean


class Gram:
    """Sum of x xᵀ, shape ``[width, width]``, float64; what is above the diagonal of the sum is nobody's business."""

    def __init__(self, width: int, device: str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        add_moment(self._sum, x)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, "width width"]:
        return mean_moment(self._sum, self.tokens)

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        gram = cls(0)
        gram._sum, gram.tokens = state["sum"].clone(), int(state["tokens"])
        return gram


class BucketGram(Gram):
    """Sum of x̄ x̄ᵀ over the averaged windows; each `update` is one window.

    Windows are averaged in the order in which they come.  A bucket is closed when it is full, when a window of another
    length comes, and when two statistics are merged; what it holds until then counts as a smaller bucket.
    """

    by_window: ClassVar[bool] = True

    def __init__(self, width: int, device: str = "cpu") -> None:
        super().__init__(width, device)
        self._rows = 0
        self._bucket = self._sum.new_zeros(0, width)
        self._filled = 0

    def update(self, x: Float[Tensor, "tokens width"]) -> None:
        if not x.shape[0]:
            return
        if self._filled and len(x) != len(self._bucket):
            self._close()
        self._bucket = self._bucket + x if self._filled else x.to(torch.float64, copy=True)
        self._filled += 1
        self.tokens += len(x)
        if self._filled == BUCKET:
            self._close()

    def merge(self, other: Self) -> None:
        for of in (self._open(), other._open()):
            self._sum += of.to(self._sum.device)
        self._sum += other._sum.to(self._sum.device)
        self._rows += len(self._bucket) + other._rows + len(other._bucket)
        self._bucket, self._filled = self._bucket[:0], 0
        self.tokens += other.tokens

    def mean(self) -> Float[Tensor, "width width"]:
        return mean_moment(self._sum + self._open(), self._rows + len(self._bucket))

    def state(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.tokens, self._rows, self._filled])
        return {"sum": self._sum, "bucket": self._bucket, "counts": counts}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        gram = cls(0)
        gram._sum, gram._bucket = state["sum"].clone(), state["bucket"].clone()
        gram.tokens, gram._rows, gram._filled = state["counts"].tolist()
        return gram

    def _open(self) -> Float[Tensor, "width width"]:
        """What the windows of the bucket that is not full yet would add."""
        average = self._bucket / max(self._filled, 1)
        return average.T @ average

    def _close(self) -> None:
        self._sum += self._open()
        self._rows += len(self._bucket)
        self._bucket, self._filled = self._bucket[:0], 0
