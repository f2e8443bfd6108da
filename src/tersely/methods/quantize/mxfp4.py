"""MXFP4: floats of 4 bits whose blocks share a power of two, the format that hardware multiplies.

Elements are E2M1, ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}; a block of 32 neighbouring columns has the scale

    2^e,   e = floor(log2 max|w|) - 2,

kept in one byte: 4.25 bits a weight.  The largest |w| of a block lies in [4, 8) · 2^e; what is above 6 · 2^e becomes
6 · 2^e, off by at most 2 · 2^e, half the widest gap and then some.  A power of two cannot follow the range of a block,
so the loss is the same for blocks of any width: about 1.3 % of the energy of normal weights, against 0.83 % for 4-bit
integers in groups of 64.  What speaks for the format is speed where there is hardware for it.

Differences from the specification: a block of zeros takes the largest scale of the weight, not the least; a block is as
wide as is asked for, and the last one of a row as narrow as it comes out.

Source: Rouhani et al., OCP Microscaling Formats (MX) Specification, version 1.0, 2023, sections 5.2, 5.3 and 6.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.kinds.quantized import QuantizedLinear
from tersely.linalg.grid import Grid, Scales, in_groups, wide
from tersely.methods.quantize.widths import check_group, check_width, sizes_of
from tersely.option import Amount, Option
from tersely.stats import Statistic, Stats

TABLE = "e2m1"
BITS = 4
LARGEST_POWER = 2
"""Of two in the largest level, 6 = 1.5 · 2²."""


@dataclass(frozen=True)
class MXFP4:
    group: int = 32
    """Neighbouring columns that share a power of two; 32 is the format's, 0 for all of a row."""

    paper: ClassVar[str] = "Rouhani et al., 2023, OCP Microscaling Formats (MX) Specification, version 1.0"
    summary: ClassVar[str] = "floats of 4 bits, a power of two for each block, data-free"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_group("mxfp4", self.group)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        return sizes_of(shape, self.group, (BITS,), zeros=False, scale="e8m0")

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are those of the weight itself, ‖W - W'‖², as if inputs were white."""
        whole, only = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        dense, grid = wide(weight), self._grid(weight)
        lost = (dense - grid.levels(grid.nearest(dense))).double().square().sum().item()
        return [replace(whole, error=dense.double().square().sum().item()), replace(only, error=lost)]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> QuantizedLinear:
        check_width(amount, BITS, "MXFP4")
        grid = self._grid(weight)
        return QuantizedLinear.from_codes(grid.nearest(weight), grid, weight.dtype)

    def _grid(self, weight: Float[Tensor, "out in"]) -> Grid:
        largest = in_groups(wide(weight), self.group).abs().amax(-1)
        # frexp has its mantissa in [0.5, 1): floor(log2) is one less than its exponent
        power = torch.frexp(largest).exponent - 1 - LARGEST_POWER
        wanted = torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), power), largest)
        return Grid(BITS, self.group, Scales.of(torch.where(largest > 0, wanted, largest), "e8m0"), None, TABLE)
