"""Round to nearest: every weight becomes the nearest level of its group's grid, blind to the data.

Loses  ‖W - W'‖²,  at most (s/2)² for every weight.  At 8 bits nothing can be seen of it, at 4 bits in groups of 64 to
128 little, at 3 bits much; it is the baseline of every other method and the rounding inside most of them.

Differences from the usual codes: scales are stored first and codes chosen on the stored ones, rounded up so that
the bound above holds; no absolute floor under scales, which ruins layers whose weights are tiny; `shrink` is the search
of GPTQ's code (least Σ|w - w'|^2.4 over shrunken ranges), which pays at 2 and 3 bits.

Source: Dettmers and Zettlemoyer, The case for 4-bit precision: k-bit Inference Scaling Laws, 2022 (arXiv 2212.09720),
for groups; the asymmetric grid as in Frantar et al., GPTQ, 2022 (arXiv 2210.17323).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import Form, Grid, fit_grid, wide
from tersely.methods.quantize.widths import StoredScale, check_grid, check_scale, width_of, width_sizes
from tersely.option import Option
from tersely.stats import Statistic, Stats


@dataclass(frozen=True)
class RoundToNearest:
    group: int = 64
    """Neighbouring columns that share a scale; 0 for all of a row.  A smaller one is better and takes more bytes."""

    grid: Form = "asymmetric"
    """Levels of a group: "asymmetric" from its least to its largest weight, with a zero point; "symmetric" around zero;
    "symmetric_full" likewise, using the lowest level and clipping the largest weight by half a step."""

    width: int | None = None
    """Bits of a code, 1 to 8; None offers 2, 3, 4 and 8."""

    scale: StoredScale = "float16"
    """How scales are stored: "float16", or in a byte ("log8"), which allows groups nearly half as wide."""

    shrink: bool = False
    """Search for the range of each group that rounds best, instead of spanning all of it; 80 times slower."""

    paper: ClassVar[str] = (
        "Dettmers and Zettlemoyer, 2022, The case for 4-bit precision: k-bit Inference Scaling Laws (arXiv 2212.09720)"
    )
    summary: ClassVar[str] = "round to nearest in groups, data-free"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_grid("rtn", self.group, self.grid, self.width)
        check_scale("rtn", self.scale)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return width_sizes(shape, self.group, self.grid, self.width, self.scale)

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are those of the weight itself, ‖W - W'‖², as if inputs were white."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        return [
            replace(whole, error=wide(weight).double().square().sum().item()),
            *(replace(size, error=self._lost(weight, size.amount)) for size in sizes),
        ]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> QuantizedLinear:
        grid = self._grid(weight, amount)
        return QuantizedLinear.from_codes(grid.nearest(weight), grid, weight.dtype)

    def _lost(self, weight: Tensor, bits: int | None) -> float:
        grid = self._grid(weight, bits)
        return (wide(weight) - grid.levels(grid.nearest(weight))).double().square().sum().item()

    def _grid(self, weight: Tensor, amount: int | None) -> Grid:
        bits = width_of(amount, self.grid, self.width)
        return fit_grid(weight, bits, self.group, self.grid, shrink=self.shrink, format=self.scale)
