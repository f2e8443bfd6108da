"""AQLM: a few weights at a time as a sum of vectors that are learned for the matrix.

A group of g neighbouring weights becomes  s_i (C_1[k_1] + ... + C_M[k_M]),  with M codebooks of 2^B vectors for the
whole matrix and one scale for each row; M B / g bits for a weight, and what codebooks and scales take.  Vectors fill
space better than grids do: Gaussian weights at 2 bits lose 9 % of their energy, on a grid of their own range 21 %.

Minimises  tr((W - W') H (W - W')ᵀ),  H = E[x xᵀ] + λI, by turns (all steps in `linalg.additive`):

    start        residual k-means of the rows, each divided by its root mean square
    feedback     codes group by group, what is lost made up for by the groups to come; scales and codebooks refitted
    search       codes by beam search from those there are, no row ever worse; scales and codebooks refitted

Feedback and search go on as long as a turn gains `tolerance`.  Codebooks are then rounded to the dtype that stores
them, and codes searched once more for the rounded ones.

Differences from the authors' code.  Codebooks are not trained by 100 steps of Adam: with codes fixed, the loss is
quadratic in them, and ten conjugate gradients end where Adam would; measured on a correlated 384 x 384 weight at 2 x 7
bits, one of them is below 100 steps of Adam at its best rate.  Scales are solved for as well.  Codes start with error
feedback, after GPTQ, which theirs do not; there, the error after the search was .0224 of the energy with it and .0337
without.  λ keeps directions that calibration hardly showed from being written off.  The codes of a few weights at the
end of a row that g does not divide are whole codes.

Tuning codebooks, scales and norms of a whole block, the paper's second half, is ``[step.refine]`` (`refine`).

A codebook takes 2^B g numbers whatever the size of the matrix: at B = 8 and g = 8 that is 0.002 bits for a weight of
4096 x 4096, in 16 bits, and 4 bits for one of 128 x 128 in a model of 32.  Small matrices want small ones.

Source: Egiazarian et al., Extreme Compression of Large Language Models via Additive Quantization, 2024, section 3
(arXiv 2401.06118); the feedback over groups of columns as in van Baalen et al., GPTVQ: The Blessing of Dimensionality
for LLM Quantization, 2024 (arXiv 2402.15319).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds.codebook import WIDEST, CodebookLinear, codebook_bytes
from tersely.linalg.additive import (
    Additive,
    Wanted,
    beam_search,
    feed_back,
    fit_codebooks,
    fit_scales,
    group_feedback,
    residual_kmeans,
)
from tersely.linalg.grid import wide
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

logger = logging.getLogger(__name__)

BOOKS = (1, 2, 3, 4)
"""Codebooks that are offered where none were asked for."""

WIDTHS = (4, 6, 8)
"""Bits of their codes that are offered where none were asked for; the small ones are for small matrices."""

TURNS = 20
"""Of feedback, and of search, at most."""


@dataclass(frozen=True)
class AQLM:
    codebooks: int | None = None
    """Vectors in a sum, each out of a codebook of its own; None offers 1 to 4."""

    width: int | None = None
    """Bits of a code, 1 to 16: a codebook has 2^width vectors.  None offers 4, 6 and 8."""

    group: int = 8
    """Neighbouring columns that share a code, the length of a vector."""

    beam: int = 8
    """Hypotheses that a search keeps; more of them are slower and a little better."""

    tolerance: float = 0.01
    """A turn has to lower the error by this share of it, or is the last (no unit)."""

    damping: float = 0.01
    """λ, added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    seed: int = 0
    """Of the centres that k-means starts at, and of the order of the search."""

    paper: ClassVar[str] = (
        "Egiazarian et al., 2024, Extreme Compression of Large Language Models via Additive Quantization "
        "(arXiv 2401.06118)"
    )
    summary: ClassVar[str] = "groups of weights as sums of learned vectors, for 2 bits and less"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.codebooks is not None and self.codebooks < 1:
            raise RecipeError(f"aqlm: {self.codebooks} codebooks; wanted 1 or more, 1 to 4 are usual")
        if self.width is not None and self.width not in range(1, WIDEST + 1):
            raise RecipeError(f"aqlm: width {self.width}; wanted 1 to {WIDEST}")
        if self.group < 1:
            raise RecipeError(f"aqlm: group {self.group}; wanted 1 column or more, 8 is usual")
        if self.beam < 1:
            raise RecipeError(f"aqlm: beam {self.beam}; wanted 1 hypothesis or more")
        if not 0 < self.tolerance < 1:
            raise RecipeError(f"aqlm: tolerance {self.tolerance}; wanted above 0 and below 1, a share of the error")
        if not 0 <= self.damping < math.inf:
            raise RecipeError(f"aqlm: damping {self.damping}; wanted 0 or more, a fraction of the mean input power")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        found = [
            Option({"codebooks": books, "bits": bits}, codebook_bytes(shape, books, bits, self.group, itemsize), None)
            for books in (BOOKS if self.codebooks is None else (self.codebooks,))
            for bits in (WIDTHS if self.width is None else (self.width,))
        ]
        return [Option(0, 0, None), *sorted(found, key=lambda option: option.nbytes)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact, tr((W - W') G (W - W')ᵀ) of the W' that `compress` will make."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        gram, dense = _metric(stats), weight.double()
        errors = []
        for size in sizes:
            off = dense - self.compress(weight, stats, size.amount).to_dense().double()
            errors.append(max(((off @ gram) * off).sum().item(), 0.0))
        energy = ((dense @ gram) * dense).sum().item()
        return [replace(whole, error=energy), *(replace(o, error=e) for o, e in zip(sizes, errors, strict=True))]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> CodebookLinear:
        books, bits = self._read(amount)
        given, exponent = _of_order_one(weight)
        gram = _metric(stats)
        power = gram.diagonal().mean()
        if not torch.isfinite(gram).all():
            raise NumericalError(
                "the input statistic has entries that are not finite; calibrate in float32 or bfloat16"
            )
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        wanted = Wanted.of(given, gram / power + self.damping * identity, self.group)
        coded = self._coded(wanted, books, bits, weight.dtype)
        if not (torch.isfinite(coded.codebooks).all() and torch.isfinite(coded.scales).all()):
            raise NumericalError("aqlm: codebooks left the range of numbers; give a larger damping")
        return CodebookLinear.of(
            coded.codes, coded.codebooks, coded.scales, weight.shape[1], exponent=exponent, dtype=weight.dtype
        )

    def _coded(self, wanted: Wanted, books: int, bits: int, dtype: torch.dtype) -> Additive:
        generator = torch.Generator().manual_seed(self.seed)
        spread = group_feedback(wanted)
        if spread.damping > 0:
            logger.warning("aqlm: a Gram matrix is not positive definite; added %g of its mean power", spread.damping)

        def fitted(now: Additive) -> Additive:
            return fit_codebooks(fit_scales(now, wanted), wanted)

        best = fitted(residual_kmeans(wanted, books, 2**bits, generator))
        least = wanted.loss(best)
        for _ in range(TURNS):
            now = fitted(feed_back(best, wanted, spread, self.beam))
            loss, former = wanted.loss(now), least
            if loss < least:
                best, least = now, loss
            if not loss < (1 - self.tolerance) * former:
                break
        for _ in range(TURNS):
            best = fitted(beam_search(best, wanted, self.beam, generator)[0])
            least, former = wanted.loss(best), least
            if not least < (1 - self.tolerance) * former:
                break
        stored = replace(
            best,
            codebooks=best.codebooks.to(dtype).to(best.codebooks.dtype),
            scales=best.scales.to(dtype).to(best.scales.dtype),
        )
        return beam_search(stored, wanted, self.beam, generator)[0]

    def _read(self, amount: Amount) -> tuple[int, int]:
        if isinstance(amount, dict) and amount.keys() == {"codebooks", "bits"}:
            books, bits = amount["codebooks"], amount["bits"]
            whole = type(books) is int and type(bits) is int and books >= 1 and bits in range(1, WIDEST + 1)
            if whole and self.codebooks in (None, books) and self.width in (None, bits):
                return books, bits
        raise RecipeError(
            f"aqlm: amount {amount!r}; wanted codebooks ({self.codebooks or '1 or more'}) and bits "
            f"({self.width or f'1 to {WIDEST}'})"
        )


def _metric(stats: Stats) -> Float[Tensor, "in in"]:
    """The Gram matrix; the identity where nothing was observed."""
    gram = stats[Gram].mean()
    return gram if gram.diagonal().any() else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _of_order_one(weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out in"], int]:
    """The weight over a power of two, so that its root mean square lies in [1/2, 1), and that power."""
    given = wide(weight).contiguous()
    if not torch.isfinite(given).all():
        raise NumericalError("the weight has entries that are not finite; repair the checkpoint before compressing it")
    if not given.any():
        return given, 0
    # the largest first, or squares of small numbers were zero
    exponent = int(torch.frexp(given.abs().max()).exponent)
    given = torch.ldexp(given, torch.tensor(-exponent))
    rest = int(torch.frexp(given.square().mean().sqrt()).exponent)
    return torch.ldexp(given, torch.tensor(-rest)), exponent + rest
