"""Alternating least squares on the two factors of a truncation, from plain SVD towards the metric of the inputs.

The paper re-fits the factors A (out x r) and B (r x in) of a truncated weight in turn, each by an exact pseudo-inverse:

    A ← W G Bᵀ (B G Bᵀ)⁺,        B ← A⁺ W,        G = E[x xᵀ],

which both minimise E‖(W - A B)x‖² (for B the inputs cancel).  After every second step  A B = Q Qᵀ W,  with Q a basis
of the columns of A, and put into the first step this reads

    columns of the next A  =  (W G Wᵀ) · columns of A.

So the alternation is subspace iteration with the output covariance C = W G Wᵀ: each round multiplies by C and
orthonormalises.  What follows:

* The error falls monotonically to that of the r leading eigenvectors of C, which are the whitened truncation
  (`svd_llm`); what it lies above that shrinks in the end by (λ_{r+1} / λ_r)² a round.
* Started there, as the paper does, it stays: with the same inputs nothing can be gained.  What the paper gains must
  come from other inputs (those behind compressed blocks, with the dense output as the target; that problem is solved
  in one step by `aa_svd`) or from an inexact truncation.  A start that changes nothing is not offered.
* Started from plain SVD and stopped after a few `iterations`, it lies between `svd` and `svd_llm`: loud directions are
  whitened first, quiet ones keep what the weight says, which is of use on texts unlike the calibration.
* The spans of smaller ranks are nested, so one iteration serves all ranks and tells all their errors.

Departures: a QR takes the place of both pseudo-inverses, so that nothing is inverted and no cut-off has to be chosen.
The Gram matrix holds every token, so the paper's buckets, which average the activations of windows position by
position to save memory, are not needed.  With `buckets` they are made all the same, 32 windows each, to show what they
cost: the factors then minimise the error on sequences that nobody wrote.  The paper shuffles windows before it fills
buckets; ours are filled in the order of the text, from windows drawn at random.  The division of ratios by importance
is an allocator, not part of this file.

Source: Li et al., AdaSVD: Adaptive Singular Value Decomposition for Large Language Models, 2025 (arXiv 2502.01403).
"""

from collections.abc import Sequence
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
    damped_gram,
    factorised,
    leaves_as_stored,
    rank_options,
    rank_sizes,
)
from tersely.option import Option
from tersely.stats import BucketGram, Gram, Statistic, Stats


@dataclass(frozen=True)
class AdaSVD:
    iterations: int = 1
    """Rounds of two steps, 0 (plain SVD) or more; the paper's best at 40 to 60 % removed is 1."""

    damping: float = 1e-6
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    buckets: bool = False
    """Fit to windows averaged 32 at a time, as the paper does to save memory, instead of to every token."""

    pivot: bool = False
    """Store r rows of the product in place of a factor: r² numbers fewer at rank r, so a higher rank in as many
    bytes (see `kinds.pivoted`)."""

    paper: ClassVar[str] = "Li et al., 2025, AdaSVD: Adaptive Singular Value Decomposition (arXiv 2502.01403)"
    summary: ClassVar[str] = "plain SVD whose factors are fitted to the inputs in turn"
    leaves: ClassVar[tuple[str, ...]] = leaves_as_stored()

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise RecipeError(f"adasvd: iterations {self.iterations}; wanted 0 (plain SVD) or more")
        check_damping("adasvd", self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (BucketGram if self.buckets else Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return rank_sizes(shape, itemsize, self.pivot)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact without damping; with it they are upper bounds, by at most damping · power · ‖W - W'‖².
        Those of buckets are errors on averaged windows."""
        return rank_options(weight, self._basis(weight, stats), self.pivot)

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        check_rank(weight, amount, self.pivot)
        return factorised(weight, self._basis(weight, stats), amount, self.pivot)

    def _basis(self, weight: Float[Tensor, "out in"], stats: Stats) -> OutputBasis:
        if self.buckets:  # the Gram matrix of other sequences, in the place of that of the tokens
            stats = Stats({Gram: stats[BucketGram]})
        return alternated(output_basis(weight), damped_gram(stats, self.damping), self.iterations)


def alternated(start: OutputBasis, metric: Float[Tensor, "in in"], iterations: int) -> OutputBasis:
    """The start after so many rounds; its first r vectors are what r columns of the start become.

    Energies are those in the metric; they need not fall, and those left behind at every rank are exact.
    """
    assert start.vectors is not None  # a start without vectors has nothing to iterate on
    if not torch.isfinite(metric).all():
        raise NumericalError("the input statistic has entries that are not finite; calibrate in float32 or bfloat16")
    covariance = covariance_of_outputs(start.core, metric.double())
    if not torch.isfinite(covariance).all():
        raise NumericalError("the product of weight and input statistic overflows float64; a scale is wrong by far")
    vectors = start.vectors
    for _ in range(iterations):
        vectors = torch.linalg.qr(covariance @ vectors).Q
    energy = ((covariance @ vectors) * vectors).sum(0).clamp(min=0)
    return replace(start, energy=energy, vectors=vectors)
