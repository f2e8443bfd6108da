"""SpQR: error feedback on small groups, and the weights that spoil it in 16 bits.

A weight can be too expensive to round in two ways: it stretches the grid of its group, so that its neighbours are
rounded coarsely, or it is itself off by much where the inputs are loud.  With U from the Gram matrix of the inputs (see
`gptq`, `linalg.hessian`),

 1. what leaving a weight out of its group is worth (`methods.quantize.outliers`), in the prices 1 / U_jj² of errors in
    column j, finds those that stretch the grids, in rounds, since a group may hold several;
 2. the grids are fitted without them, and error feedback rounds the rest; outliers are exact and cause no error.

With `search = "sweep"` those of step 1 are candidates only, as in the paper: left out of the grids, they are outliers
if a first sweep finds that rounding them at their turn, on grids without them, costs more than the least of the values
of step 1, as all other weights are; the ⌈r · out · in⌉ most expensive ones it is.  That misses what an outlier does to
its neighbours, and was measured to lose more (docs/lab.md).

With r = 0 this is `gptq` bit for bit.

Departures: the authors give a threshold and get some number of outliers; here the number is given, since the bytes of a
site are known before its weights are seen, and the threshold follows.  Theirs fit the grid of a group to the updated
weights during the only sweep; here grids stand before it, so that the order of the columns leaves no trace.  Their
scales and zero points are rounded to 3 bits in groups of 16; here scales take a byte and zero points the width of a
code.  Their code damps with the whole mean power; the default here is the hundredth part of it.

Source: Dettmers et al., SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression, 2023,
sections 4 and 5 (arXiv 2306.03078).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError, unknown
from tersely.kinds import LinearKind
from tersely.linalg.grid import Form, fit_grid, wide
from tersely.linalg.hessian import Feedback
from tersely.methods.quantize.outliers import (
    check_outliers,
    largest,
    left_out,
    metric_of,
    outlier_bytes,
    outlier_count,
    spread_of,
    swept,
    with_outliers,
)
from tersely.methods.quantize.widths import WIDTHS, StoredScale, check_grid, check_scale, sizes_of, width_of
from tersely.option import Option
from tersely.stats import Gram, Statistic, Stats


@dataclass(frozen=True)
class SpQR:
    share: float = 0.01
    """Of the weights of a linear, those that stay in 16 bits, rounded up to a whole number of them (no unit)."""

    group: int = 16
    """Neighbouring columns that share a scale; 0 for all of a row.  The paper's is 16."""

    grid: Form = "asymmetric"
    """Levels of a group: "asymmetric", "symmetric" or "symmetric_full", as those of rtn."""

    width: int | None = None
    """Bits of a code, 1 to 8; None offers 2, 3, 4 and 8."""

    damping: float = 0.01
    """Added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit); the authors' code has
    1."""

    act_order: bool = True
    """Take the columns by falling power of their inputs, rather than from left to right."""

    search: Literal["left_out", "sweep"] = "left_out"
    """What makes an outlier: what leaving it out of its group is worth, or, as in the paper, what it costs at its turn
    in a sweep with those left out."""

    scale: StoredScale = "log8"
    """How scales are stored: in a byte, or "float16"."""

    shrink: bool = False
    """Search for the range of each group that rounds best, once the outliers are known; pays at 2 and 3 bits."""

    paper: ClassVar[str] = (
        "Dettmers et al., 2023, SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression "
        "(arXiv 2306.03078)"
    )
    summary: ClassVar[str] = "error feedback on small groups; the weights that cost it most stay in 16 bits"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_grid("spqr", self.group, self.grid, self.width)
        check_scale("spqr", self.scale)
        if self.search not in ("left_out", "sweep"):
            raise RecipeError(f"spqr: {unknown('search', str(self.search), ('left_out', 'sweep'))}")
        check_outliers("spqr", self.share, self.damping)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        widths = WIDTHS if self.width is None else (self.width,)
        whole, *sizes = sizes_of(shape, self.group, widths, zeros=self.grid == "asymmetric", scale=self.scale)
        beside = outlier_bytes(shape, outlier_count(self.share, shape))
        return [whole, *(replace(size, nbytes=size.nbytes + beside) for size in sizes)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact, tr((W - W') G (W - W')ᵀ) of the W' that `compress` will make."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        gram, spread = metric_of(stats), self._spread(stats)
        dense = wide(weight).double()
        found = [replace(whole, error=((dense @ gram) * dense).sum().item())]
        for size in sizes:
            off = dense - self._rounded(weight, spread, size.amount).to_dense().double()
            found.append(replace(size, error=((off @ gram) * off).sum().item()))
        return found

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> LinearKind:
        return self._rounded(weight, self._spread(stats), amount)

    def _spread(self, stats: Stats) -> Feedback:
        return spread_of("spqr", stats, self.damping, loudest_first=self.act_order)

    def _rounded(self, weight: Float[Tensor, "out in"], spread: Feedback, amount: int) -> LinearKind:
        bits = width_of(amount, self.grid, self.width)
        values = wide(weight).masked_fill(spread.dead, 0.0)
        if not torch.isfinite(values).all():
            raise NumericalError("the weight has entries that are not finite; repair the checkpoint first")
        count = outlier_count(self.share, (weight.shape[0], weight.shape[1]))
        prices = torch.empty(values.shape[1], dtype=torch.float64, device=values.device)
        prices[spread.order] = spread.own.square()
        outliers, least = left_out(values, prices[None], count, bits, self.group, self.grid)
        if self.search == "sweep":
            grid = fit_grid(values.masked_fill(outliers, 0.0), bits, self.group, self.grid)
            outliers = largest(swept(values, spread, grid, threshold=math.sqrt(least))[2], count)
        rest = values.masked_fill(outliers, 0.0)
        grid = fit_grid(rest, bits, self.group, self.grid, shrink=self.shrink, format=self.scale)
        codes, values, _ = swept(values, spread, grid, outliers)
        return with_outliers(codes, grid, outliers, values, weight.dtype)
