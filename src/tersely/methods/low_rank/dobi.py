"""Dobi-SVD's weight update: a projection onto the output directions that windows have in common.

Of one window of inputs X the best output of rank g is the truncated SVD of the output itself: no weight of rank g does
better (Eckart and Young).  It is  Y V Vᵀ  with V the g leading right singular vectors of Y = X Wᵀ, so for this window
alone the weight would be  V Vᵀ W.  One weight has to serve all windows, and it projects onto the k directions that
their V have in common, the principal components of all of them:

    W' = A Aᵀ W,        A = the k leading eigenvectors of  Σ_windows V Vᵀ,        AᵀA = 1.

This has the form of whitening (`svd_llm`), whose projector is that of Σ Yᵀ Y = Σ V Σ² Vᵀ: with `weighted`, and nothing
cut from any window, the two are one; with one window they are one anyway.  Unweighted, as in the paper, a quiet window
counts as much as a loud one, and in a window its tenth direction as much as its first.  The output error is therefore
never below that of whitening on the same inputs; the errors in `options` say by how much.

How many directions g of a window of L tokens go with k of the weight: the weight has d = min(m, n) of them, the
window min(L, d), and g = ⌈k min(L, d) / d⌉.  The paper's ratio, c = ⌊min(m, n) / L⌋, is zero for windows that are
longer than the weight is wide.  Directions that a window does not excite are left out; where all windows together have
fewer than k, the covariance of the outputs says which ones follow.

The authors' code feeds an incremental PCA (`incremental`): window after window, the scatter so far is cut to its k
leading components before the next V is added.  It also subtracts means (`centre`), against the theory and against
sense, as the mean of singular vectors depends on signs that nothing determines; here their largest entry is positive.
Both are for comparisons.

Windows are a sample (`stats.windows`); errors are those on all inputs.  Spans of different ranks are not nested, so a
curve costs an eigenproblem for every rank, of the smaller side of the weight; it then has `ranks` of them.  An
allocator that needs no curve pays for nothing but its own rank.

Source: Wang et al., Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives, 2025, section 3.2 and
their code (arXiv 2502.02723).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds import LinearKind
from tersely.linalg.truncation import OutputBasis, covariance_of_outputs, output_basis
from tersely.methods.low_rank.factorise import (
    check_damping,
    check_rank,
    check_storage,
    damped_gram,
    factorised,
    largest_rank,
    leaves_as_stored,
    left_by_remapped,
    rank_sizes,
    remapped,
    remapped_sizes,
)
from tersely.option import Option
from tersely.stats import Gram, Statistic, Stats, WindowFactors

SMALLEST = 1e-7
"""Directions of a window below this share of its loudest are not counted as excited: R is rounded to float32."""

DECIDING = 1e-6
"""Weight of the covariance of outputs in the scatter: enough to decide where windows say nothing."""


@dataclass(frozen=True)
class DobiSVD:
    weighted: bool = False
    """Whether directions count by their energy; the paper's do not."""

    centre: bool = False
    """Whether the mean of all directions is subtracted, as the authors' code does and their theory does not."""

    incremental: bool = False
    """Whether the scatter is cut to k components after every window, as by the authors' code, or never."""

    damping: float = 1e-6
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit); it orders directions
    that no input excites."""

    ranks: int = 64
    """Ranks that are offered, evenly spread over those smaller than the weight; all of them where there are fewer than
    twice as many.  Allocators that compare errors pay for each."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    remap: bool = False
    """Store the factors in 8 bits, what the longer one has more of in 16: every rank up to the full one is smaller than
    the weight in 16 bits (see `kinds.remapped`); not together with `pivot`."""

    paper: ClassVar[str] = (
        "Wang et al., 2025, Dobi-SVD: Differentiable SVD for LLM Compression and Some New Perspectives "
        "(arXiv 2502.02723)"
    )
    summary: ClassVar[str] = "projection onto the output directions that calibration windows have in common"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        check_damping("dobi", self.damping)
        check_storage("dobi", self.pivot, self.remap)
        if self.ranks < 1:
            raise RecipeError(f"dobi: ranks {self.ranks}; wanted 1 or more")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram, WindowFactors)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        ranks = self._offered(shape)
        return remapped_sizes(shape, ranks) if self.remap else rank_sizes(shape, itemsize, self.pivot, ranks)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact without damping; with it they are upper bounds, by at most damping · power · ‖W - W'‖².

        A rank more is not guaranteed to lose less, as its span is another one; allocators drop an option that loses
        more than a smaller one.
        """
        metric = damped_gram(stats, self.damping)
        basis = output_basis(weight, metric)
        energies = covariance_of_outputs(basis.core, metric)
        whole = energies.trace()
        errors = {0: whole.item()}
        ranks = self._offered((weight.shape[0], weight.shape[1]))
        for rank, span in zip(ranks, self._spans(basis, energies, stats, ranks), strict=True):
            if self.remap:
                stored = remapped(weight, replace(basis, vectors=span), rank)
                errors[rank] = left_by_remapped(weight, stored, metric)[-1].item()
            else:
                kept = span[:, :rank]
                errors[rank] = (whole - ((energies @ kept) * kept).sum()).clamp(min=0).item()
        sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        return [replace(size, error=errors[size.amount]) for size in sizes]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        check_rank(weight, amount, self.pivot)
        metric = damped_gram(stats, self.damping)
        basis = output_basis(weight, metric)
        (span,) = self._spans(basis, covariance_of_outputs(basis.core, metric), stats, [amount])
        chosen = replace(basis, vectors=span)
        return remapped(weight, chosen, amount) if self.remap else factorised(weight, chosen, amount, self.pivot)

    def _offered(self, shape: tuple[int, int]) -> list[int]:
        """Rising."""
        largest = largest_rank(shape, self.pivot)
        if largest <= 2 * self.ranks:
            return list(range(1, largest + 1))
        if not (self.pivot or self.remap):
            largest = (shape[0] * shape[1] - 1) // sum(shape)
        count = min(self.ranks, largest)
        return [-(-largest * place // count) for place in range(1, count + 1)]

    def _spans(
        self, basis: OutputBasis, energies: Float[Tensor, "d d"], stats: Stats, ranks: Sequence[int]
    ) -> Iterator[Float[Tensor, "d d"]]:
        """For rising ranks A, and behind it an orthonormal rest, in the coordinates of the basis' core."""
        width, factors = len(energies), stats[WindowFactors].factors()
        # a factor has as many rows as its window has directions
        shares = [min(len(factor), width) / width for factor in factors]
        found = [_directions(factor @ basis.core.T) for factor in factors]
        loudest = max((float(s[0]) for s, _ in found if len(s)), default=1.0)
        windows = [v * (s / loudest) if self.weighted else v for s, v in found]
        power = energies.trace()
        deciding = energies * (DECIDING / power) if power > 0 else energies
        scatter, taken = _Scatter(energies), [0] * len(windows)
        for rank in ranks:
            if self.incremental:
                scatter, taken = _Scatter(energies), [0] * len(windows)
            for number, (vectors, share) in enumerate(zip(windows, shares, strict=True)):
                upto = math.ceil(rank * share)
                scatter.add(vectors[:, taken[number] : upto], centre=self.centre)
                taken[number] = upto
                if self.incremental:
                    scatter.cut(rank)
            total = scatter.value + deciding * max(float(scatter.value.trace()), SMALLEST)
            yield torch.linalg.eigh((total + total.T) / 2).eigenvectors.flip(1)


class _Scatter:
    """Σ v vᵀ over vectors, or Σ (v - v̄)(v - v̄)ᵀ, added up piece by piece."""

    def __init__(self, like: Float[Tensor, "d d"]) -> None:
        self.value = torch.zeros_like(like)
        self._mean = torch.zeros_like(like[0])
        self._count = 0

    def add(self, vectors: Float[Tensor, "d count"], *, centre: bool) -> None:
        count = vectors.shape[1]
        if count == 0:
            return
        self.value = self.value + vectors @ vectors.T
        if centre:
            mean, both = vectors.mean(1), self._count + count
            apart = self._mean - mean
            shift = (self._count * count / both) * torch.outer(apart, apart)
            self.value = self.value - count * torch.outer(mean, mean) + shift
            self._mean = (self._count * self._mean + count * mean) / both
        self._count += count

    def cut(self, rank: int) -> None:
        """Keep the leading components alone."""
        energy, vectors = torch.linalg.eigh(self.value)
        kept = vectors[:, -rank:]
        self.value = (kept * energy[-rank:].clamp(min=0)) @ kept.T


def _directions(outputs: Float[Tensor, "rows d"]) -> tuple[Float[Tensor, " count"], Float[Tensor, "d count"]]:
    """Singular values and right singular vectors, the loudest first, as far as the window excites them."""
    if not torch.isfinite(outputs).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    _, s, vh = torch.linalg.svd(outputs, full_matrices=False)
    excited = s > SMALLEST * s[0]
    v = vh[excited].T
    # so that a mean of them means the same on every machine
    largest = v.gather(0, v.abs().argmax(0, keepdim=True)) if v.numel() else v.new_ones(1, v.shape[1])
    return s[excited], v * largest.sign()
