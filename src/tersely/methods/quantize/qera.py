"""QERA: integers, and beside them a branch of low rank that makes up for what rounding lost.

    W' = Q + U V,    Q quantized,  U of shape (out, r),  V of shape (r, in)

For given integers the branch that loses least, E‖(W - Q - U V) x‖² = tr((W - Q - U V) G (W - Q - U V)ᵀ) with
G = E[x xᵀ], is the best approximation by rank r of the error W - Q under the metric G, and what it leaves is the energy
of the directions that it drops (`linalg.truncation`).  The paper whitens with G^½ and unwhitens with its inverse;
U_r U_rᵀ (W - Q) is the same matrix without a root.  A diagonal G, the power of every channel, is the paper's
approximation and nearly LQER's scaling; no metric at all is the truncated SVD of the error.

Both can be turned over: `rounds` times the integers are made anew, for W - U V, and the branch for their error.
Rounding is no projection, so nothing says that this falls; the best of all rounds is kept, the first included, and so
more rounds are never worse.  Neither is the branch ever worse than none: if rounding its factors should spoil it, it is
zero.

A branch pays for r (out + in) numbers where a further bit pays for out · in bits, so it is cheap for wide weights only,
and it gains as much as the error has directions that stand out.

Factors lie in `factor_width` bits, symmetric, one scale of a byte for every row; V first, with error feedback in the
metric G, then the U that is best for the V that was stored, with feedback in V G Vᵀ.

Departures: the authors' factors are 16 bit floats and their integers rounded to nearest (or MXINT); alternating is
LoftQ's (Li et al., 2023), which does it without a metric.

Source: Zhang et al., QERA: an Analytical Framework for Quantization Error Reconstruction, 2024, section 3
(arXiv 2410.06040).
Source: Zhang et al., LQER: Low-Rank Quantization Error Reconstruction for LLMs, 2024, section 3 (arXiv 2402.02446).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError, unknown
from tersely.kinds import LinearKind, LowRankLinear, SumLinear
from tersely.kinds.quantized import QuantizedLinear, quantized_bytes
from tersely.linalg.grid import fit_grid, wide
from tersely.linalg.hessian import feedback
from tersely.linalg.truncation import OutputBasis, output_basis
from tersely.methods.quantize.gptq import GPTQ, rounded_with_feedback
from tersely.methods.quantize.hqq import HalfQuadratic
from tersely.methods.quantize.outliers import metric_of
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.methods.quantize.sinq import SinkhornNormalized
from tersely.methods.quantize.widths import WIDTHS
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

Quantizer = GPTQ | HalfQuadratic | RoundToNearest | SinkhornNormalized
Named = Literal["gptq", "hqq", "rtn", "sinq"]
Metric = Literal["gram", "channels", "none"]

FACTOR_DAMPING = 0.01
"""Of the error feedback of factors, as a fraction of the mean power (no unit); the same as gptq's."""

DEGENERATE = 1e-9
"""Directions of the rounded V that carry less than this share of its energy are not fitted."""

MOST_BITS = 2
"""The ladder ends where the branch takes more bits per weight than this: those of a code would do more."""

SHRUNK = 3
"""Codes of so many bits or fewer have their ranges searched."""


@dataclass(frozen=True)
class QERA:
    rank: int | None = None
    """Rank of the branch, that of the weight at most; 0 for none, None offers 0, 1, 2, 4, ..."""

    width: int | None = None
    """Bits of a code, 1 to 8; None offers 2, 3, 4 and 8."""

    quantize: Named = "gptq"
    """Who rounds: "gptq", "sinq" (with error feedback), "hqq" or "rtn"."""

    group: int = 64
    """Neighbouring columns that share a scale; 0 for all of a row."""

    shrink: bool = True
    """Of gptq and rtn: search for the range of each group that rounds best, for codes of up to 3 bits."""

    metric: Metric = "gram"
    """What the branch minimises: the output error ("gram"), that of uncorrelated inputs ("channels"), or that of the
    weight ("none")."""

    factor_width: int | None = 8
    """Bits of a number of the branch, 2 to 8; None keeps the dtype of the weight."""

    rounds: int = 0
    """How often integers and branch are made anew, each for what the other leaves."""

    paper: ClassVar[str] = (
        "Zhang et al., 2024, QERA: an Analytical Framework for Quantization Error Reconstruction (arXiv 2410.06040)"
    )
    summary: ClassVar[str] = "integers, and a branch of low rank for what rounding lost"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, value, known in (("quantize", self.quantize, Named), ("metric", self.metric, Metric)):
            if value not in get_args(known):
                raise RecipeError(f"qera: {unknown(name, str(value), get_args(known))}")
        if self.rank is not None and self.rank < 0:
            raise RecipeError(f"qera: rank {self.rank}; wanted 0 (no branch) or more")
        if self.factor_width is not None and self.factor_width not in range(2, 9):
            raise RecipeError(
                f"qera: factor_width {self.factor_width}; wanted 2 to 8 bits, or none for the weight's own"
            )
        if self.rounds < 0:
            raise RecipeError(f"qera: rounds {self.rounds}; wanted 0 or more")
        for width in self._widths:
            self._quantizer(width)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return tuple(dict.fromkeys([Gram, *self._quantizer(self._widths[0]).needs]))

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        found = []
        for width in self._widths:
            integers = self._quantizer(width).sizes(shape, itemsize)[-1].nbytes
            for rank in self._ranks(shape, itemsize):
                beside = branch_bytes(shape, rank, self.factor_width, itemsize)
                found.append(Option({"bits": width, "rank": rank}, integers + beside, None))
        return [Option(0, 0, None), *sorted(found, key=lambda option: option.nbytes)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact, tr((W - W') G (W - W')ᵀ) of the W' that `compress` will make, whatever `metric` is."""
        shape, fit = (weight.shape[0], weight.shape[1]), self._fit(weight, stats)
        whole, *sizes = self.sizes(shape, weight.element_size())
        ranks = self._ranks(shape, weight.element_size())
        errors = {
            (width, rank): error
            for width in self._widths
            for rank, (_, _, error) in zip(ranks, self._made(fit, stats, width, ranks), strict=True)
        }
        found = [replace(o, error=errors[o.amount["bits"], o.amount["rank"]]) for o in sizes]
        return [replace(whole, error=fit.error(fit.dense)), *found]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> LinearKind:
        width, rank = self._read(amount, (weight.shape[0], weight.shape[1]))
        integers, branch, _ = next(self._made(self._fit(weight, stats), stats, width, [rank]))
        return integers if branch is None else SumLinear.of([integers, branch])

    def _made(
        self, fit: "BranchFit", stats: Stats, width: int, ranks: Sequence[int]
    ) -> Iterator[tuple[QuantizedLinear, LowRankLinear | None, float]]:
        """Integers, branch and what they leave, for every rank; integers alone are made once for all of them."""
        alone = self._quantizer(width).compress(fit.weight, stats, width)
        off = fit.dense - alone.to_dense().double()
        basis = fit.basis(off) if any(ranks) else None
        for rank in ranks:
            if not rank or basis is None:
                yield alone, None, fit.error(off)
                continue
            branch, error = fit.branch(basis, off, rank)
            best = alone, branch, error
            for _ in range(self.rounds):
                rest = fit.dense - branch.to_dense().double()
                integers = self._integers(rest, fit.weight, stats, width)
                left = fit.dense - integers.to_dense().double()
                branch, error = fit.branch(fit.basis(left), left, rank)
                best = min(best, (integers, branch, error), key=lambda made: made[2])
            yield best

    def _integers(self, rest: Tensor, weight: Tensor, stats: Stats, width: int) -> QuantizedLinear:
        """Of a weight that is in no 16 bits."""
        made = self._quantizer(width).compress(rest.to(wide(weight).dtype), stats, width)
        return QuantizedLinear.from_codes(made.unpacked(), made.grid(), weight.dtype)

    def _fit(self, weight: Float[Tensor, "out in"], stats: Stats) -> "BranchFit":
        return BranchFit.of(weight, metric_of(stats), self.metric, self.factor_width)

    @property
    def _widths(self) -> tuple[int, ...]:
        return WIDTHS if self.width is None else (self.width,)

    def _quantizer(self, width: int) -> Quantizer:
        return quantizer_of(self.quantize, width, self.group, shrink=self.shrink)

    def _ranks(self, shape: tuple[int, int], itemsize: int) -> list[int]:
        if self.rank is not None:
            return [min(self.rank, *shape)]
        room = MOST_BITS * shape[0] * shape[1] / 8
        ladder = [2**step for step in range(min(shape).bit_length())]
        return [0, *(rank for rank in ladder if branch_bytes(shape, rank, self.factor_width, itemsize) <= room)]

    def _read(self, amount: Amount, shape: tuple[int, int]) -> tuple[int, int]:
        if isinstance(amount, dict) and amount.keys() == {"bits", "rank"}:
            width, rank = amount["bits"], amount["rank"]
            if width in (range(1, 9) if self.width is None else self._widths) and rank in range(min(shape) + 1):
                return width, rank
        wanted = "1 to 8" if self.width is None else str(self.width)
        raise RecipeError(
            f"qera: amount {amount!r} for a weight of {shape}; wanted bits, {wanted}, and a rank up to {min(shape)}"
        )


def quantizer_of(name: str, width: int, group: int, *, shrink: bool) -> Quantizer:
    """The method of this name for one width, as it is best beside a branch."""
    match name:
        case "gptq":
            return GPTQ(group=group, width=width, shrink=shrink and width <= SHRUNK)
        case "rtn":
            return RoundToNearest(group=group, width=width, shrink=shrink and width <= SHRUNK)
        case "sinq":
            return SinkhornNormalized(group=group, width=width, feedback=True)
    return HalfQuadratic(group=group, width=width)


def branch_bytes(shape: tuple[int, int], rank: int, width: int | None, itemsize: int) -> int:
    """Of both factors; no rank, no branch."""
    if not rank:
        return 0
    if width is None:
        return rank * sum(shape) * itemsize
    factors = ((shape[0], rank), (rank, shape[1]))
    return sum(quantized_bytes(factor, width, 0, zeros=False, scale="log8") for factor in factors)


@dataclass(frozen=True)
class BranchFit:
    """What branches are fitted to."""

    weight: Float[Tensor, "out in"]
    """As it came."""
    dense: Float[Tensor, "out in"]
    """The same in float64."""
    gram: Float[Tensor, "in in"]
    """Of the inputs: what errors are measured in."""
    metric: Float[Tensor, "in in"] | Float[Tensor, " in"] | None
    """What branches minimise: full, diagonal, or the identity (None)."""
    width: int | None
    """Bits of their numbers, None for the dtype of the weight."""

    @classmethod
    def of(
        cls, weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], metric: Metric, width: int | None
    ) -> "BranchFit":
        """Raises NumericalError for a weight or a Gram matrix that is not finite."""
        if not torch.isfinite(weight).all():
            raise NumericalError("the weight has entries that are not finite; repair the checkpoint first")
        if not torch.isfinite(gram).all():
            raise NumericalError(
                "the input statistic has entries that are not finite; calibrate in float32 or bfloat16"
            )
        gram = gram.double()
        chosen = {"gram": gram, "channels": gram.diagonal(), "none": None}[metric]
        return cls(weight, wide(weight).double(), gram, chosen, width)

    def error(self, off: Float[Tensor, "out in"]) -> float:
        """tr(off G offᵀ); what rounding makes negative is zero."""
        return max(((off @ self.gram) * off).sum().item(), 0.0)

    def basis(self, off: Float[Tensor, "out in"]) -> OutputBasis:
        return output_basis(off, self.metric)

    def branch(self, basis: OutputBasis, off: Float[Tensor, "out in"], rank: int) -> tuple[LowRankLinear, float]:
        """The stored branch for an error of which this is the basis, and what is left of it; never more than all."""
        up, down = basis.factors(rank)
        dtype = self.weight.dtype
        made = LowRankLinear.from_factors(up, down, dtype)
        if self.width is not None:
            first = _rounded(down, self._full(), self.width, dtype)
            read = first.to_dense().double()
            across, within = self._times(off) @ read.T, self._times(read) @ read.T
            within = (within + within.T) / 2
            best = across @ torch.linalg.pinv(within, rtol=DEGENERATE, hermitian=True)
            made.set_submodule("down", first)
            made.set_submodule("up", _rounded(best, within, self.width, dtype))
        error, alone = self.error(off - made.to_dense().double()), self.error(off)
        if error <= alone:
            return made, error
        if self.width is None:
            return LowRankLinear.from_factors(torch.zeros_like(up), down, dtype), alone
        made.set_submodule("up", _rounded(torch.zeros_like(up), torch.eye(rank).to(up), self.width, dtype))
        return made, alone

    def _full(self) -> Float[Tensor, "in in"]:
        if self.metric is None:
            return torch.eye(len(self.gram)).to(self.gram)
        return self.metric.diag() if self.metric.ndim == 1 else self.metric

    def _times(self, of: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        if self.metric is None:
            return of
        return of * self.metric if self.metric.ndim == 1 else of @ self.metric


def _rounded(factor: Tensor, metric: Tensor, width: int, dtype: torch.dtype) -> QuantizedLinear:
    """A factor as integers, with error feedback in the metric of what it reads."""
    grid = fit_grid(factor, width, 0, "symmetric", format="log8")
    spread = feedback(metric, damping=FACTOR_DAMPING, loudest_first=True)
    codes, _ = rounded_with_feedback(factor, grid, spread)
    return QuantizedLinear.from_codes(codes, grid, dtype)
