"""QERA: integers, and beside them a branch of low rank that makes up for what rounding lost.

    W' = Q + U V,    Q quantized,  U of shape (out, r),  V of shape (r, in)

For given integers the branch that loses least, E‖(W - Q - U V) x‖² = tr((W - Q - U V) G (W - Q - U V)ᵀ) with
G = E[x xᵀ], is the best approximation by rank r of the error W - Q under the metric G, and what it leaves is the energy
of the directions that it drops (`linalg.truncation`).  The paper whitens with G^½ and unwhitens with its inverse;
U_r U_rᵀ (W - Q) is the same matrix without a root.  A diagonal G, the power of every channel, is the paper's
approximation and nearly LQER's scaling; no metric at all is the truncated SVD of the error.

Whoever rounds with error feedback makes up for what a branch that stands already misses, the rounding of its factors
included.  So both are tried: the branch after the integers, and, `rounds` times, the integers for W - U V and then the
branch for what they leave, beginning with the truncated SVD of W, which takes from the ranges of the groups (under the
metric of the inputs it was measured to be a worse beginning).  Rounding is no projection, so nothing says that this
falls; the best pair that was met is kept, and so more rounds are never worse.  Neither is the branch ever worse than
none: if rounding its factors should spoil it, it is zero.

A branch pays for r (out + in) numbers where a further bit pays for out · in bits: it is cheap for wide weights only,
and it gains as much as the error has directions that stand out.

Factors lie in `factor_width` bits, symmetric, one scale of a byte for every row; V first, with error feedback in the
metric G, then the U that is best for the V that was stored, with feedback in V G Vᵀ.

Departures: the authors' factors are 16 bit floats and their integers rounded to nearest (or MXINT); alternating is
LoftQ's (Li et al., 2023), which does it without a metric.

Source: Zhang et al., QERA: an Analytical Framework for Quantization Error Reconstruction, 2024, section 3
(arXiv 2410.06040).
Source: Zhang et al., LQER: Low-Rank Quantization Error Reconstruction for LLMs, 2024, section 3 (arXiv 2402.02446).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError, unknown
from tersely.kinds import LinearKind, LowRankLinear, SumLinear
from tersely.kinds.quantized import QuantizedLinear, Zeros, quantized_bytes
from tersely.linalg.grid import fit_grid, wide
from tersely.linalg.hessian import Feedback, feedback
from tersely.linalg.truncation import OutputBasis, output_basis
from tersely.methods.quantize.gptq import rounded_with_feedback
from tersely.methods.quantize.hqq import HalfQuadratic
from tersely.methods.quantize.outliers import metric_of, spread_of
from tersely.methods.quantize.sinq import SinkhornNormalized
from tersely.methods.quantize.widths import WIDTHS, StoredScale, check_grid, check_scale, sizes_of
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

Named = Literal["gptq", "hqq", "rtn", "sinq"]
Metric = Literal["gram", "channels", "none"]
Weighing = Tensor | None
"""A metric: full, a vector for a diagonal one, or None for the identity."""

DAMPING = 0.01
"""Of error feedback, as a fraction of the mean input power (no unit); gptq's."""

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

    scale: StoredScale = "log8"
    """How scales of groups are stored: in a byte ("log8"), or "float16"."""

    shrink: bool = True
    """Of gptq and rtn: search for the range of each group that rounds best, for codes of up to 3 bits."""

    metric: Metric = "gram"
    """What the branch minimises: the output error ("gram"), that of uncorrelated inputs ("channels"), or that of the
    weight ("none")."""

    factor_width: int | None = 4
    """Bits of a number of the branch, 2 to 8; None keeps the dtype of the weight."""

    rounds: int = 2
    """How often the integers are made for what the branch leaves, and the branch for what they leave.  0 is the paper:
    integers, then one branch."""

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
        self._rounder.check("qera", self._widths)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        found = []
        for width in self._widths:
            integers = self._rounder.nbytes(shape, width)
            for rank in self._ranks(shape, itemsize):
                beside = branch_bytes(shape, rank, self.factor_width, itemsize)
                found.append(Option({"bits": width, "rank": rank}, integers + beside, None))
        return [Option(0, 0, None), *sorted(found, key=lambda option: option.nbytes)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact, tr((W - W') G (W - W')ᵀ) of the W' that `compress` will make, whatever `metric` is."""
        shape, fit = (weight.shape[0], weight.shape[1]), self._fit(weight, stats)
        whole, *sizes = self.sizes(shape, weight.element_size())
        ranks = self._ranks(shape, weight.element_size())
        errors: dict[tuple[int, int], float] = {}
        for width in self._widths:
            alone = self._rounder.rounded(fit, fit.dense, width)
            errors |= {(width, rank): self._beside(fit, alone, width, rank)[2] for rank in ranks}
        found = [replace(o, error=errors[o.amount["bits"], o.amount["rank"]]) for o in sizes]
        return [replace(whole, error=fit.error(fit.dense)), *found]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> LinearKind:
        width, rank = self._read(amount, (weight.shape[0], weight.shape[1]))
        fit = self._fit(weight, stats)
        integers, branch, _ = self._beside(fit, self._rounder.rounded(fit, fit.dense, width), width, rank)
        return integers if branch is None else SumLinear.of([integers, branch])

    def _beside(self, fit: "BranchFit", alone: QuantizedLinear, width: int, rank: int) -> "Made":
        return fit.beside(alone, rank, lambda rest: self._rounder.rounded(fit, rest, width), self.rounds)

    def _fit(self, weight: Float[Tensor, "out in"], stats: Stats) -> "BranchFit":
        return BranchFit(weight, stats, self.metric, self.factor_width)

    @property
    def _widths(self) -> tuple[int, ...]:
        return WIDTHS if self.width is None else (self.width,)

    @property
    def _rounder(self) -> "Rounder":
        return Rounder(self.quantize, self.group, self.scale, self.shrink)

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


@dataclass(frozen=True)
class Rounder:
    """Who makes the integers, and on which grids; what it makes is bit for bit what the method of its name makes."""

    name: Named
    group: int
    scale: StoredScale
    shrink: bool

    def check(self, method: str, widths: Sequence[int]) -> None:
        """Raises RecipeError for grids that do not exist."""
        check_scale(method, self.scale)
        for width in widths:
            check_grid(method, self.group, "asymmetric", width)

    def nbytes(self, shape: tuple[int, int], width: int) -> int:
        zeros: Zeros = "float16" if self.name == "hqq" else True
        columns = self.name == "sinq"
        return sizes_of(shape, self.group, (width,), zeros=zeros, scale=self.scale, columns=columns)[-1].nbytes

    def rounded(self, fit: "BranchFit", wanted: Float[Tensor, "out in"], width: int) -> QuantizedLinear:
        """Integers for a matrix in place of the weight."""
        dtype, values = fit.weight.dtype, wanted.to(wide(fit.weight).dtype)
        match self.name:
            case "sinq":
                method = SinkhornNormalized(group=self.group, width=width, scale=self.scale, feedback=True)
                made = method.compress(values, fit.stats, width)
                return QuantizedLinear.from_codes(made.unpacked(), made.grid(), dtype)
            case "hqq":
                made = HalfQuadratic(group=self.group, width=width, scale=self.scale).compress(values, fit.stats, width)
                return QuantizedLinear.from_codes(made.unpacked(), made.grid(), dtype)
        if self.name == "gptq":
            values = values.masked_fill(fit.spread.dead, 0.0)
        grid = fit_grid(values, width, self.group, shrink=self.shrink and width <= SHRUNK, format=self.scale)
        codes = grid.nearest(values) if self.name == "rtn" else rounded_with_feedback(values, grid, fit.spread)[0]
        return QuantizedLinear.from_codes(codes, grid, dtype)


def branch_bytes(shape: tuple[int, int], rank: int, width: int | None, itemsize: int) -> int:
    """Of both factors; no rank, no branch."""
    if not rank:
        return 0
    if width is None:
        return rank * sum(shape) * itemsize
    factors = ((shape[0], rank), (rank, shape[1]))
    return sum(quantized_bytes(factor, width, 0, zeros=False, scale="log8") for factor in factors)


Made = tuple[QuantizedLinear, LowRankLinear | None, float]
"""Integers, the branch beside them, and the error tr(Δ G Δᵀ) of both."""


class BranchFit:
    """A weight and what is known of its inputs: what integers and branches are fitted to."""

    def __init__(self, weight: Float[Tensor, "out in"], stats: Stats, metric: Metric, width: int | None) -> None:
        """metric: what branches minimise; width: bits of their numbers, None for the dtype of the weight.  Raises
        NumericalError for a weight or a Gram matrix that is not finite."""
        if not torch.isfinite(weight).all():
            raise NumericalError("the weight has entries that are not finite; repair the checkpoint first")
        self.weight, self.stats, self.width = weight, stats, width
        self.dense = wide(weight).double()
        self.gram = metric_of(stats).double()
        if not torch.isfinite(self.gram).all():
            raise NumericalError("the input statistic has entries that are not finite; calibrate in float32")
        self.metric = {"gram": self.gram, "channels": self.gram.diagonal(), "none": None}[metric]

    @cached_property
    def spread(self) -> Feedback:
        """How errors of the weight spread on these inputs."""
        return spread_of("qera", self.stats, DAMPING, loudest_first=True)

    def error(self, off: Float[Tensor, "out in"]) -> float:
        """tr(off G offᵀ); what rounding makes negative is zero."""
        return max(((off @ self.gram) * off).sum().item(), 0.0)

    def beside(
        self, alone: QuantizedLinear, rank: int, rounded: Callable[[Tensor], QuantizedLinear], rounds: int
    ) -> Made:
        """The best integers with a branch of this rank.

        alone: the integers of the weight; rounded: those of another matrix in its place.
        """
        off = self.dense - alone.to_dense().double()
        if not rank:
            return alone, None, self.error(off)
        branch, error = self._branch(output_basis(off, self.metric, rank=rank), off, rank, self.metric)
        found = [(alone, branch, error)]
        if rounds:
            branch, _ = self._branch(output_basis(self.dense, rank=rank), self.dense, rank, None)
        for _ in range(rounds):
            integers = rounded(self.dense - branch.to_dense().double())
            off = self.dense - integers.to_dense().double()
            found.append((integers, branch, self.error(off - branch.to_dense().double())))
            branch, error = self._branch(output_basis(off, self.metric, rank=rank), off, rank, self.metric)
            found.append((integers, branch, error))
        return min(found, key=lambda made: made[2])

    def _branch(
        self, basis: OutputBasis, off: Float[Tensor, "out in"], rank: int, metric: Weighing
    ) -> tuple[LowRankLinear, float]:
        """The stored branch for an error with this basis, and what is left of it; never more than there was."""
        up, down = basis.factors(rank)
        dtype = self.weight.dtype
        made = LowRankLinear.from_factors(up, down, dtype)
        if self.width is not None:
            first = _rounded(down, _full(metric, down), self.width, dtype)
            read = first.to_dense().double()
            across, within = _times(off, metric) @ read.T, _times(read, metric) @ read.T
            within = (within + within.T) / 2
            best = across @ torch.linalg.pinv(within, rtol=DEGENERATE, hermitian=True)
            made.set_submodule("down", first)
            made.set_submodule("up", _rounded(best, within, self.width, dtype))
        error, nothing = self.error(off - made.to_dense().double()), self.error(off)
        if error <= nothing:
            return made, error
        if self.width is None:
            return LowRankLinear.from_factors(torch.zeros_like(up), down, dtype), nothing
        made.set_submodule("up", _rounded(torch.zeros_like(up), torch.eye(rank).to(up), self.width, dtype))
        return made, nothing


def _full(metric: Weighing, like: Float[Tensor, "rank in"]) -> Float[Tensor, "in in"]:
    if metric is None:
        return torch.eye(like.shape[1]).to(like)
    return metric.diag() if metric.ndim == 1 else metric


def _times(of: Float[Tensor, "rows in"], metric: Weighing) -> Float[Tensor, "rows in"]:
    if metric is None:
        return of
    return of * metric if metric.ndim == 1 else of @ metric


def _rounded(factor: Tensor, metric: Tensor, width: int, dtype: torch.dtype) -> QuantizedLinear:
    """A factor as integers, with error feedback in the metric of what it reads."""
    grid = fit_grid(factor, width, 0, "symmetric", format="log8")
    spread = feedback(metric, damping=DAMPING, loudest_first=True)
    codes, _ = rounded_with_feedback(factor, grid, spread)
    return QuantizedLinear.from_codes(codes, grid, dtype)
