"""GPTQ: round column by column, and let the columns that are still to come make up for the error.

Minimises  tr((W - W') G (W - W')ᵀ),  G = E[x xᵀ], greedily: column by column is rounded to the level nearest to what
makes up best for the errors of those before it (`linalg.hessian`).  The error is exact and comes with the sweep, so
`options` runs it for every width.

Differences from the authors' code: G + λI is factorised and never inverted, which is the same sweep with less work;
the grids of all groups are fitted to the given weight beforehand ("static groups"), in whichever order columns are
taken, so that the order leaves no trace in the result, and the size of blocks neither; scales are stored first and
codes chosen on the stored ones.  Inputs that were silent throughout get weight zero, as
theirs do, but the value that replaces their diagonal entry is the mean power, not 1, so that the result does not depend
on the scale of the activations.  If every input was silent, nothing is known of any: all directions count alike, which
is rounding to nearest.  If G + λI has no Cholesky factor, λ grows tenfold with a warning, to the mean power at most;
beyond that it is an error.  There is no other way back to rounding to nearest.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022,
section 3 (arXiv 2210.17323).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kernels import round_block
from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import Form, Grid, fit_grid, wide
from tersely.linalg.hessian import Feedback, feedback, sweep_blocks
from tersely.methods.quantize.widths import StoredScale, check_grid, check_scale, width_of, width_sizes
from tersely.option import Option
from tersely.stats import Gram, Statistic, Stats

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTQ:
    group: int = 64
    """Neighbouring columns that share a scale; 0 for all of a row.  A smaller one is better and takes more bytes."""

    grid: Form = "asymmetric"
    """Levels of a group: "asymmetric" from its least to its largest weight, with a zero point; "symmetric" around zero;
    "symmetric_full" likewise, using the lowest level and clipping the largest weight by half a step."""

    width: int | None = None
    """Bits of a code, 1 to 8; None offers 2, 3, 4 and 8."""

    scale: StoredScale = "float16"
    """How scales are stored: "float16", or in a byte ("log8"), which allows groups nearly half as wide."""

    damping: float = 0.01
    """λ, added to the diagonal of the Gram matrix, as a fraction of the mean input power (no unit)."""

    act_order: bool = True
    """Take the columns by falling power of their inputs, rather than from left to right."""

    shrink: bool = False
    """Search for the range of each group that rounds best, instead of spanning all of it; pays at 2 and 3 bits."""

    block: int = 128
    """Columns between two products with the rest; changes the time, not the result."""

    paper: ClassVar[str] = (
        "Frantar et al., 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers "
        "(arXiv 2210.17323)"
    )
    summary: ClassVar[str] = "rounding with error feedback in the metric of the inputs"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_grid("gptq", self.group, self.grid, self.width)
        check_scale("gptq", self.scale)
        if not 0 <= self.damping < math.inf:
            raise RecipeError(f"gptq: damping {self.damping}; wanted 0 or more, a fraction of the mean input power")
        if self.block < 1:
            raise RecipeError(f"gptq: block {self.block}; wanted 1 column or more, 128 is usual")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram,)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return width_sizes(shape, self.group, self.grid, self.width, self.scale)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are exact, tr((W - W') G (W - W')ᵀ) of the W' that `compress` will make."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        gram = self._gram(stats)
        spread = self._spread(gram)
        dense = wide(weight).double()
        energy = ((dense @ gram) * dense).sum().item()
        lost = (self._rounded(weight, spread, width_of(size.amount, self.grid, self.width))[2] for size in sizes)
        return [replace(whole, error=energy), *(replace(size, error=e) for size, e in zip(sizes, lost, strict=True))]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> QuantizedLinear:
        bits = width_of(amount, self.grid, self.width)
        codes, grid, _ = self._rounded(weight, self._spread(self._gram(stats)), bits)
        return QuantizedLinear.from_codes(codes, grid, weight.dtype)

    def _gram(self, stats: Stats) -> Float[Tensor, "in in"]:
        gram = stats[Gram].mean()
        if gram.diagonal().any():
            return gram
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)

    def _spread(self, gram: Float[Tensor, "in in"]) -> Feedback:
        spread = feedback(gram, damping=self.damping, loudest_first=self.act_order)
        if spread.damping > self.damping:
            logger.warning(
                "gptq: a Gram matrix is not positive definite with damping %g; took %g", self.damping, spread.damping
            )
        return spread

    def _rounded(
        self, weight: Float[Tensor, "out in"], spread: Feedback, bits: int
    ) -> tuple[UInt8[Tensor, "out in"], Grid, float]:
        """Codes, their grid, and the error."""
        weight = wide(weight).masked_fill(spread.dead, 0.0)
        grid = fit_grid(weight, bits, self.group, self.grid, shrink=self.shrink, format=self.scale)
        codes, lost = rounded_with_feedback(weight, grid, spread, block=self.block)
        return codes, grid, lost


def rounded_with_feedback(
    weight: Float[Tensor, "out in"], grid: Grid, spread: Feedback, *, block: int = 128
) -> tuple[UInt8[Tensor, "out in"], float]:
    """Codes on a grid, column by column with error feedback, and the error tr((W - W') G (W - W')ᵀ) that they leave.

    Scales of columns need no Hessian of their own: with W / t and diag(t) H diag(t) every e_i would be the same.
    Raises NumericalError where the feedback leaves the finite numbers.
    """
    rounding = grid.rounding(weight, spread.order)
    lost = sweep_blocks(weight, spread, partial(round_block, rounding), block=block).loss(spread)
    codes = rounding.codes.T.contiguous()
    if not math.isfinite(lost):
        raise NumericalError("the error feedback diverged; give a larger damping, or round to nearest")
    return codes, lost
