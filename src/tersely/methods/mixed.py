"""Ranks and bits in one curve: a site may become two factors, small integers, or two factors of small integers.

Three families of options compete for the same bytes:

    {"rank": r}               the factors of a low-rank method, in the weight's dtype
    {"bits": b}               the weight itself, quantized
    {"rank": r, "bits": b}    both factors quantized

All errors are tr(Δ G Δᵀ), G = E[x xᵀ], of the very module that `compress` makes, rounding of every kind included; so
an allocator may mix families from site to site.  An exact one (`knapsack`) then does no worse than with any family
alone.

Exact errors of some hundred options stay cheap by three facts.  The factors of a smaller rank are the first columns and
rows of those of a larger one.  A quantizer works row by row of a weight, so the quantized factor `down` of a smaller
rank is the first rows of the quantized one of the largest rank: one run for every width.  With W' = U V the error is

    tr(W G Wᵀ) - 2 tr(Uᵀ (W G Vᵀ)) + tr(Uᵀ U (V G Vᵀ)),

whose brackets are, for smaller ranks, parts of those of the largest one.  `up` is quantized after `down`, in the metric
of what it will really read, V G Vᵀ with the quantized V.

Departures from the sources, which truncate at one precision and a fixed budget: every rank may have every width, and
nothing is fitted again after the rounding.

Source: Saha et al., Compressing Large Language Models using Low Rank and Low Precision Decomposition, 2024
(arXiv 2405.18886), for factors of few bits; ranks after Wang et al., SVD-LLM, 2024 (arXiv 2403.07378).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import RecipeError, unknown
from tersely.kinds import LinearKind, LowRankLinear, dense_weight
from tersely.kinds.quantized import QuantizedLinear
from tersely.methods.low_rank.asvd import ChannelScaledSVD
from tersely.methods.low_rank.svd import PlainSVD
from tersely.methods.low_rank.svd_llm import WhitenedSVD
from tersely.methods.quantize.gptq import GPTQ
from tersely.methods.quantize.rtn import RoundToNearest
from tersely.option import Amount, Option
from tersely.stats import Gram, Statistic, Stats

LOW_RANK = {"asvd": ChannelScaledSVD, "svd": PlainSVD, "svd_llm": WhitenedSVD}
QUANTIZE = {"gptq": GPTQ, "rtn": RoundToNearest}


@dataclass(frozen=True)
class Mixed:
    low_rank: Literal["asvd", "svd", "svd_llm"] = "svd_llm"
    """The method whose factors are offered, with its usual settings."""

    quantize: Literal["gptq", "rtn"] = "gptq"
    """The method that rounds weights and factors, on its usual grid."""

    widths: tuple[int, ...] = (2, 3, 4, 8)
    """Bits of a code that are offered."""

    group: int = 64
    """Neighbouring columns that share a scale; 0 for all of a row."""

    ranks: int = 16
    """How many ranks are offered, denser among the small ones, up to the rank at which factors in full precision are as
    large as the weight."""

    paper: ClassVar[str] = (
        "Saha et al., 2024, Compressing Large Language Models using Low Rank and Low Precision Decomposition "
        "(arXiv 2405.18886)"
    )
    summary: ClassVar[str] = "ranks and bits in one curve: factors, integers, or factors of integers"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.low_rank not in LOW_RANK:
            raise RecipeError(f"mixed: {unknown('low_rank', str(self.low_rank), LOW_RANK)}")
        if self.quantize not in QUANTIZE:
            raise RecipeError(f"mixed: {unknown('quantize', str(self.quantize), QUANTIZE)}")
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise RecipeError(f"mixed: widths {list(self.widths)}; wanted one or more, each once")
        if self.ranks < 1:
            raise RecipeError(f"mixed: ranks {self.ranks}; wanted 1 or more")
        for width in self.widths:
            self._quantizer(width)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return tuple(dict.fromkeys([Gram, *LOW_RANK[self.low_rank]().needs]))

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        out, columns = shape
        ranks = self._ranks(shape)
        found = [Option({"rank": rank}, rank * (out + columns) * itemsize, None) for rank in ranks]
        for width in self.widths:
            found.append(Option({"bits": width}, self._bytes(shape, width), None))
            for rank in ranks:
                nbytes = self._bytes((out, rank), width) + self._bytes((rank, columns), width)
                found.append(Option({"rank": rank, "bits": width}, nbytes, None))
        return [Option(0, 0, None), *sorted(found, key=lambda option: option.nbytes)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are those of the modules that `compress` makes."""
        gram = _metric(stats)
        dense = weight.double()
        seen = dense @ gram
        energy = (seen * dense).sum().item()
        errors: dict[tuple[int | None, int | None], float] = {}
        ranks = self._ranks((weight.shape[0], weight.shape[1]))
        factors = self._factors(weight, stats) if ranks else None
        if factors is not None:
            down = dense_weight(factors.down).double()
            up = dense_weight(factors.up).double()
            across, within = seen @ down.T, down @ gram @ down.T
            for rank in ranks:
                errors[rank, None] = _error(energy, across, within, up[:, :rank])
        for width in self.widths:
            quantizer = self._quantizer(width)
            lost = dense - quantizer.compress(weight, stats, width).to_dense().double()
            errors[None, width] = ((lost @ gram) * lost).sum().item()
            if factors is None:
                continue
            down = quantizer.compress(_weight(factors.down), stats, width).to_dense().double()
            across, within = seen @ down.T, down @ gram @ down.T
            for rank in ranks:
                up = self._quantized_up(factors, within[:rank, :rank], width).to_dense().double()
                errors[rank, width] = _error(energy, across, within, up)
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        return [
            Option(whole.amount, whole.nbytes, energy),
            *(Option(o.amount, o.nbytes, errors[o.amount.get("rank"), o.amount.get("bits")]) for o in sizes),
        ]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> LinearKind:
        rank, width = self._read(amount, (weight.shape[0], weight.shape[1]))
        if rank is None:
            return self._quantizer(width).compress(weight, stats, width)
        factors = self._factors(weight, stats)
        up, down = _weight(factors.up), _weight(factors.down)
        made = LowRankLinear.from_factors(up[:, :rank], down[:rank], weight.dtype)
        if width is not None:
            quantized = _first_rows(self._quantizer(width).compress(down, stats, width), rank, weight.dtype)
            read = quantized.to_dense().double()
            made.set_submodule("down", quantized)
            made.set_submodule("up", self._quantized_up(factors, read @ _metric(stats) @ read.T, width))
        return made

    def _quantizer(self, width: int) -> GPTQ | RoundToNearest:
        return QUANTIZE[self.quantize](group=self.group, width=width)

    def _bytes(self, shape: tuple[int, int], width: int) -> int:
        return self._quantizer(width).sizes(shape, 1)[-1].nbytes

    def _ranks(self, shape: tuple[int, int]) -> list[int]:
        """Rising; none where even rank 1 is no smaller than the weight."""
        largest = (shape[0] * shape[1] - 1) // sum(shape)
        wanted = range(1, self.ranks + 1)
        return sorted({-(-largest * place**2 // self.ranks**2) for place in wanted} - {0})

    def _factors(self, weight: Float[Tensor, "out in"], stats: Stats) -> LowRankLinear:
        """Of the largest rank; those of smaller ranks are parts of it."""
        rank = self._ranks((weight.shape[0], weight.shape[1]))[-1]
        return LOW_RANK[self.low_rank]().compress(weight, stats, rank)

    def _quantized_up(self, factors: LowRankLinear, metric: Float[Tensor, "rank rank"], width: int) -> QuantizedLinear:
        """The first columns of `up`, rounded for inputs with these second moments."""
        metric = (metric + metric.T) / 2
        stats = Stats({Gram: Gram.restore({"sum": metric, "tokens": torch.tensor(1)})})
        return self._quantizer(width).compress(_weight(factors.up)[:, : len(metric)].contiguous(), stats, width)

    def _read(self, amount: Amount, shape: tuple[int, int]) -> tuple[int | None, Any]:
        """(rank, bits), None for what is not asked for."""
        if isinstance(amount, dict) and amount and amount.keys() <= {"rank", "bits"}:
            rank, width = amount.get("rank"), amount.get("bits")
            largest = (self._ranks(shape) or [0])[-1]
            if (rank is None or rank in range(1, largest + 1)) and (width is None or width in self.widths):
                return rank, width
        raise RecipeError(
            f"mixed: amount {amount!r} for a weight of {shape}; wanted a rank up to "
            f"{(self._ranks(shape) or [0])[-1]}, bits out of {list(self.widths)}, or both"
        )


def _metric(stats: Stats) -> Float[Tensor, "in in"]:
    """The Gram matrix; the identity where nothing was observed, as in the methods that are put together here."""
    gram = stats[Gram].mean()
    return gram if gram.diagonal().any() else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


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
