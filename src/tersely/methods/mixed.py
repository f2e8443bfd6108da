"""Ranks and bits in one curve: factors, integers, factors of integers, and integers with a branch of low rank.

Four families of options compete for the same bytes:

    {"rank": r}                             the factors of a low-rank method, in the weight's dtype
    {"bits": b, "group": g}                 the weight itself, quantized in groups of g columns
    {"rank": r, "bits": b}                  both factors quantized
    {"bits": b, "group": g, "branch": r}    the weight quantized, and a branch of rank r for what that lost (`qera`)

All errors are tr(Δ G Δᵀ), G = E[x xᵀ], of the very module that `compress` makes, rounding of every kind included; so
an allocator may mix families from site to site.  An exact one (`knapsack`) then does no worse than with any family
alone.  Smaller groups are steps of a fraction of a bit between the widths, with a scale of a byte very small ones.

Exact errors of some hundred options stay cheap by three facts.  The factors of a smaller rank are the first columns and
rows of those of a larger one.  A quantizer works row by row of a weight, so the quantized factor `down` of a smaller
rank is the first rows of the quantized one of the largest rank: one run for every width.  With W' = U V the error is

    tr(W G Wᵀ) - 2 tr(Uᵀ (W G Vᵀ)) + tr(Uᵀ U (V G Vᵀ)),

whose brackets are, for smaller ranks, parts of those of the largest one.  `up` is quantized after `down`, in the metric
of what it will really read, V G Vᵀ with the quantized V.  Branches have no such economy: theirs are a few ranks, given
by what they cost, at one group and the few widths at which they pay.

Departures from the sources, which truncate at one precision and a fixed budget: every rank may have every width, and
nothing is fitted again after the rounding.

Source: Saha et al., Compressing Large Language Models using Low Rank and Low Precision Decomposition, 2024
(arXiv 2405.18886), for factors of few bits; ranks after Wang et al., SVD-LLM, 2024 (arXiv 2403.07378); branches after
Zhang et al., QERA, 2024 (arXiv 2410.06040).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import RecipeError, unknown
from tersely.kinds import LinearKind, LowRankLinear, SumLinear, dense_weight
from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import group_size
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.methods.quantize.outliers import metric_of
from tersely.methods.quantize.qera import BranchFit, Made, Named, Rounder, branch_bytes
from tersely.methods.quantize.widths import StoredScale
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

LOW_RANK = {"asvd": ChannelScaledSVD, "svd": PlainSVD, "svd_llm": WhitenedSVD}

FAMILIES = {("rank",), ("bits", "group"), ("bits", "rank"), ("bits", "branch", "group")}
"""What amounts speak of."""

BRANCHED = 3
"""Codes of so many bits or fewer are offered with a branch: where more of them stand, a further bit does more."""

BRANCH_ROUNDS = 2
"""How often integers and branch are made for each other."""


@dataclass(frozen=True)
class Mixed:
    low_rank: Literal["asvd", "svd", "svd_llm"] = "svd_llm"
    """The method whose factors are offered, with its usual settings."""

    quantize: Named = "gptq"
    """Who rounds weights and factors: "gptq", "sinq" (with error feedback), "hqq" or "rtn"."""

    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    """Bits of a code that are offered; 1 can be named, and is seldom better than nothing on small groups."""

    group: int = 64
    """Neighbouring columns that share a scale, of factors and beside a branch; 0 for all of a row."""

    groups: tuple[int, ...] = (16, 32, 64, 128)
    """Those that are offered for the integers of a whole weight."""

    scale: StoredScale = "log8"
    """How scales are stored: in a byte ("log8"), or "float16"."""

    shrink: bool = True
    """Of gptq and rtn: search for the range of each group that rounds best, for codes of up to 3 bits."""

    branches: tuple[float, ...] = (0.25, 0.5)
    """Bits per weight that a branch may take; each gives the largest rank that fits.  Empty: no branches."""

    factor_width: int | None = 4
    """Bits of a number of a branch, 2 to 8; None keeps the dtype of the weight."""

    ranks: int = 16
    """How many ranks are offered, denser among the small ones, up to the rank at which factors in full precision are as
    large as the weight."""

    paper: ClassVar[str] = (
        "Saha et al., 2024, Compressing Large Language Models using Low Rank and Low Precision Decomposition "
        "(arXiv 2405.18886)"
    )
    summary: ClassVar[str] = (
        "ranks and bits in one curve: factors, integers, factors of integers, integers and a branch"
    )
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.low_rank not in LOW_RANK:
            raise RecipeError(f"mixed: {unknown('low_rank', str(self.low_rank), LOW_RANK)}")
        if self.quantize not in get_args(Named):
            raise RecipeError(f"mixed: {unknown('quantize', str(self.quantize), get_args(Named))}")
        for name, offered in (("widths", self.widths), ("groups", self.groups)):
            if not offered or len(set(offered)) < len(offered):
                raise RecipeError(f"mixed: {name} {list(offered)}; wanted one or more, each once")
        if self.ranks < 0:
            raise RecipeError(f"mixed: ranks {self.ranks}; wanted 0 (no factors) or more")
        if any(not 0 < bits <= 8 for bits in self.branches):
            raise RecipeError(f"mixed: branches {list(self.branches)}; wanted bits per weight, above 0 and at most 8")
        if self.factor_width is not None and self.factor_width not in range(2, 9):
            raise RecipeError(f"mixed: factor_width {self.factor_width}; wanted 2 to 8 bits, or none")
        for group in (self.group, *self.groups):
            self._rounder(group).check("mixed", self.widths)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return tuple(dict.fromkeys([Gram, *LOW_RANK[self.low_rank]().needs]))

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        out, columns = shape
        factors, ranks = self._rounder(self.group), self._ranks(shape)
        found = [Option({"rank": rank}, rank * (out + columns) * itemsize, None) for rank in ranks]
        for width in self.widths:
            for group in self._groups(columns):
                nbytes = self._rounder(group).nbytes(shape, width)
                found.append(Option({"bits": width, "group": group}, nbytes, None))
            for rank in ranks:
                nbytes = factors.nbytes((out, rank), width) + factors.nbytes((rank, columns), width)
                found.append(Option({"rank": rank, "bits": width}, nbytes, None))
            for rank in self._branches(shape, itemsize) if width <= BRANCHED else ():
                nbytes = factors.nbytes(shape, width) + branch_bytes(shape, rank, self.factor_width, itemsize)
                found.append(Option({"bits": width, "group": self.group, "branch": rank}, nbytes, None))
        return [Option(0, 0, None), *sorted(found, key=lambda option: option.nbytes)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are those of the modules that `compress` makes."""
        shape, itemsize, gram = (weight.shape[0], weight.shape[1]), weight.element_size(), metric_of(stats)
        fit, rounder = self._fit(weight, stats), self._rounder(self.group)
        seen = fit.dense @ gram
        energy = fit.error(fit.dense)
        errors: dict[str, float] = {}
        ranks = self._ranks(shape)
        if ranks:
            factors = self._factors(weight, stats)
            up, of_down = dense_weight(factors.up).double(), self._fit(_weight(factors.down), stats)
            across, within = seen @ of_down.dense.T, of_down.dense @ gram @ of_down.dense.T
            errors |= {_key(rank=rank): _error(energy, across, within, up[:, :rank]) for rank in ranks}
            for width in self.widths:
                down = rounder.rounded(of_down, of_down.dense, width).to_dense().double()
                across, within = seen @ down.T, down @ gram @ down.T
                for rank in ranks:
                    up = self._quantized_up(factors, within[:rank, :rank], width).to_dense().double()
                    errors[_key(rank=rank, bits=width)] = _error(energy, across, within, up)
        for width in self.widths:
            for group in self._groups(shape[1]):
                alone = self._rounder(group).rounded(fit, fit.dense, width)
                errors[_key(bits=width, group=group)] = fit.error(fit.dense - alone.to_dense().double())
            branches = self._branches(shape, itemsize) if width <= BRANCHED else []
            if branches:
                alone = rounder.rounded(fit, fit.dense, width)
                for rank in branches:
                    error = self._beside(fit, alone, width, rank)[2]
                    errors[_key(bits=width, group=self.group, branch=rank)] = error
        whole, *sizes = self.sizes(shape, itemsize)
        return [replace(whole, error=energy), *(replace(o, error=errors[_key(**o.amount)]) for o in sizes)]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> LinearKind:
        asked = self._read(amount, (weight.shape[0], weight.shape[1]), weight.element_size())
        rank, width, branch = asked.get("rank"), asked.get("bits"), asked.get("branch")
        if rank is None:
            assert width is not None
            fit = self._fit(weight, stats)
            alone = self._rounder(asked["group"]).rounded(fit, fit.dense, width)
            if branch is None:
                return alone
            integers, beside, _ = self._beside(fit, alone, width, branch)
            return integers if beside is None else SumLinear.of([integers, beside])
        factors = self._factors(weight, stats)
        up, down = _weight(factors.up), _weight(factors.down)
        made = LowRankLinear.from_factors(up[:, :rank], down[:rank], weight.dtype)
        if width is not None:
            of_down = self._fit(down, stats)
            largest = self._rounder(self.group).rounded(of_down, of_down.dense, width)
            quantized = _first_rows(largest, rank, weight.dtype)
            read = largest.to_dense().double()
            made.set_submodule("down", quantized)
            within = (read @ metric_of(stats) @ read.T)[:rank, :rank]
            made.set_submodule("up", self._quantized_up(factors, within, width))
        return made

    def _fit(self, weight: Float[Tensor, "out in"], stats: Stats) -> BranchFit:
        return BranchFit(weight, stats, "gram", self.factor_width)

    def _rounder(self, group: int) -> Rounder:
        return Rounder(self.quantize, group, self.scale, self.shrink)

    def _beside(self, fit: BranchFit, alone: QuantizedLinear, width: int, rank: int) -> Made:
        """The best integers with a branch of this rank, see `qera`."""
        rounder = self._rounder(self.group)
        return fit.beside(alone, rank, lambda rest: rounder.rounded(fit, rest, width), BRANCH_ROUNDS)

    def _groups(self, columns: int) -> list[int]:
        """Without those that are the same for so few columns."""
        sizes = {group_size(columns, group): group for group in self.groups}
        return list(sizes.values())

    def _branches(self, shape: tuple[int, int], itemsize: int) -> list[int]:
        """Ranks, rising."""
        found = set()
        for bits in self.branches:
            room = bits * shape[0] * shape[1] / 8
            fitting = (
                r for r in range(min(shape), 0, -1) if branch_bytes(shape, r, self.factor_width, itemsize) <= room
            )
            found.add(next(fitting, 0))
        return sorted(found - {0})

    def _ranks(self, shape: tuple[int, int]) -> list[int]:
        """Rising; none where even rank 1 is no smaller than the weight."""
        wanted = range(1, self.ranks + 1)
        return sorted({-(-_break_even(shape) * place**2 // self.ranks**2) for place in wanted} - {0})

    def _factors(self, weight: Float[Tensor, "out in"], stats: Stats) -> LowRankLinear:
        """Of the largest rank; those of smaller ranks are parts of it."""
        rank = self._ranks((weight.shape[0], weight.shape[1]))[-1]
        return LOW_RANK[self.low_rank]().compress(weight, stats, rank)

    def _quantized_up(self, factors: LowRankLinear, metric: Float[Tensor, "rank rank"], width: int) -> QuantizedLinear:
        """The first columns of `up`, rounded for inputs with these second moments."""
        metric = (metric + metric.T) / 2
        stats = Stats({Gram: Gram.restore({"sum": metric, "tokens": torch.tensor(1)})})
        of_up = self._fit(_weight(factors.up)[:, : len(metric)].contiguous(), stats)
        return self._rounder(self.group).rounded(of_up, of_up.dense, width)

    def _read(self, amount: Amount, shape: tuple[int, int], itemsize: int) -> dict[str, int]:
        """An amount that could have been offered."""
        if isinstance(amount, dict) and tuple(sorted(amount)) in FAMILIES:
            known = {
                "rank": range(1, (self._ranks(shape) or [0])[-1] + 1),
                "bits": self.widths,
                "group": (self.group,) if "branch" in amount else self.groups,
                "branch": self._branches(shape, itemsize) if amount.get("bits", 0) in range(BRANCHED + 1) else (),
            }
            if all(value in known[name] for name, value in amount.items()):
                return amount
        raise RecipeError(
            f"mixed: amount {amount!r} for a weight of {shape}; wanted a rank up to {(self._ranks(shape) or [0])[-1]}, "
            f"bits out of {list(self.widths)}, or both; or bits and a group out of {list(self.groups)}; or bits up to "
            f"{BRANCHED}, the group {self.group} and a branch out of {self._branches(shape, itemsize)}"
        )


def _key(**amount: int) -> str:
    return repr(sorted(amount.items()))


def _break_even(shape: tuple[int, int]) -> int:
    """The largest rank at which factors have fewer numbers than the weight."""
    return (shape[0] * shape[1] - 1) // sum(shape)


def _weight(linear: torch.nn.Module) -> Tensor:
    return linear.get_parameter("weight").detach()


def _error(
    energy: float,
    across: Float[Tensor, "out largest"],
    within: Float[Tensor, "largest largest"],
    up: Float[Tensor, "out rank"],
) -> float:
    """tr((W - U V) G (W - U V)ᵀ) from W G Vᵀ and V G Vᵀ of the largest rank."""
    rank = up.shape[1]
    both = ((up @ within[:rank, :rank]) * up).sum().item()
    return max(energy - 2 * (up * across[:, :rank]).sum().item() + both, 0.0)


def _first_rows(module: QuantizedLinear, rows: int, dtype: torch.dtype) -> QuantizedLinear:
    grid = module.grid()
    scales = replace(grid.scales, raw=grid.scales.raw[:rows])
    part = replace(grid, scales=scales, zero=None if grid.zero is None else grid.zero[:rows])
    return QuantizedLinear.from_codes(module.unpacked()[:rows], part, dtype)
