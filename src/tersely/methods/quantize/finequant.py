"""FineQuant: as fine a grain as the weight itself asks for, and no finer.

Rounding to nearest on symmetric grids, with one scale for a whole row, or for groups of columns where that pays.  What
it pays is seen in the weight alone: with r̄(g) the mean over rows and groups of the largest |w| of a group of g columns,
a halving of g shrinks the steps, and with them the error, by

    1 - r̄(g/2) / r̄(g),

some 4 to 8 % for Gaussian rows between 4096 and 64 columns (the largest of g numbers grows like √(2 ln g)), and far
more where single weights stretch the range of everything around them.  The grain of a weight is found by going from
whole rows to finer groups for as long as each halving shrinks the ranges by more than `alpha`, down to groups of
`least` columns.  Weights without outliers keep a coarse grain.

The groups offered are whole rows and `least` times a power of two up to half a row, so that each divides the next and
rows of any length are allowed; the first step may be more than a halving, and its shrinking is counted per halving.

What could be done to a weight is a width with a group: {"bits": 4, "group": 128}, group 0 for rows.  Groups finer than
the grain of the rule are offered at the error of the rule's: what they gain beyond it counts for nothing, so that an
allocator that goes by errors never spends a byte on them.  Within a generous budget (`bits`) a width alone is the
paper's method; within a tight one those grains go first that lose least by being coarser.

Departures: the paper's text was not at hand, the rule is read off descriptions of it and `alpha` is ours; nothing is
left in 16 bits unless the budget says so; the fused kernels are not here.

Source: Kim et al., FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs, 2023,
(arXiv 2308.09723).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tersely.errors import RecipeError
from tersely.kinds.quantized import QuantizedLinear, quantized_bytes
from tersely.linalg.grid import fit_grid, group_count, in_groups, wide
from tersely.option import Amount, Option
from tersely.stats import Statistic, Stats

WIDTHS = (4, 8)
"""Bits that are offered where none were asked for: those of the paper's kernels."""

POSSIBLE = (3, 4, 8)


@dataclass(frozen=True)
class FineQuant:
    width: int | None = None
    """Bits of a code: 4 or 8, or 3, which the paper explores; None offers 4 and 8."""

    alpha: float = 0.1
    """Least part of its range that a group has to lose by being halved (no unit), above what Gaussian rows lose; 0
    goes down to `least` everywhere, 1 keeps whole rows."""

    least: int = 64
    """Columns of the smallest group, and what all others are a multiple of; that of the paper's kernels."""

    paper: ClassVar[str] = (
        "Kim et al., 2023, FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs "
        "(arXiv 2308.09723)"
    )
    summary: ClassVar[str] = "round to nearest in groups as small as the weight's own outliers ask for, data-free"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.width is not None and self.width not in POSSIBLE:
            raise RecipeError(f"finequant: width {self.width}; wanted 4 or 8, or 3")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"finequant: alpha {self.alpha}; wanted 0 to 1, the share of a range")
        if self.least < 1:
            raise RecipeError(f"finequant: least {self.least}; wanted 1 column or more, 64 is usual")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        made = [
            Option({"bits": bits, "group": group}, quantized_bytes(shape, bits, group, zeros=False), None)
            for bits in self._widths()
            for group in self.groups(shape[1])
        ]
        return [Option(0, 0, None), *sorted(made, key=lambda option: option.nbytes)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are those of the weight itself, ‖W - W'‖²; of a grain finer than the rule's an upper bound, that of
        the rule's."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        grain = self.grain(weight)
        ladder = self.groups(weight.shape[1])
        of_rule = {bits: self._lost(weight, bits, grain) for bits in self._widths()}

        def error(bits: int, group: int) -> float:
            lost = self._lost(weight, bits, group)
            finer = ladder.index(group) > ladder.index(grain)
            return max(lost, of_rule[bits]) if finer else lost

        return [
            replace(whole, error=wide(weight).double().square().sum().item()),
            *(replace(size, error=error(**size.amount)) for size in sizes),
        ]

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: Amount) -> QuantizedLinear:
        bits, group = self._read(amount, weight.shape[1])
        grid = fit_grid(weight, bits, group, "symmetric")
        return QuantizedLinear.from_codes(grid.nearest(weight), grid, weight.dtype)

    def groups(self, columns: int) -> tuple[int, ...]:
        """From the coarsest, 0 for whole rows, to the finest."""
        finer = []
        group = self.least
        while 2 * group <= columns:
            finer.append(group)
            group *= 2
        return (0, *reversed(finer))

    def grain(self, weight: Float[Tensor, "out in"]) -> int:
        """The group that the rule chooses, out of `groups`."""
        columns = weight.shape[1]
        coarse, *finer = self.groups(columns)
        usual = _mean_range(weight, coarse)
        for group in finer:
            halvings = math.log2((coarse or columns) / group)
            within = _mean_range(weight, group)
            if usual <= 0 or 1 - (within / usual) ** (1 / halvings) <= self.alpha:
                break
            coarse, usual = group, within
        return coarse

    def _widths(self) -> tuple[int, ...]:
        return WIDTHS if self.width is None else (self.width,)

    def _lost(self, weight: Tensor, bits: int, group: int) -> float:
        grid = fit_grid(weight, bits, group, "symmetric")
        return (wide(weight) - grid.levels(grid.nearest(weight))).double().square().sum().item()

    def _read(self, amount: Any, columns: int) -> tuple[int, int]:
        if isinstance(amount, dict) and amount.keys() == {"bits", "group"}:
            bits, group = amount["bits"], amount["group"]
            if bits in (POSSIBLE if self.width is None else (self.width,)) and group in self.groups(columns):
                return bits, group
        raise RecipeError(
            f"finequant: amount {amount!r}; wanted bits, {', '.join(map(str, self._widths()))}, and a group out of "
            f"{', '.join(map(str, self.groups(columns)))}"
        )


def _mean_range(weight: Float[Tensor, "out in"], group: int) -> float:
    """Mean over rows and columns of the largest |w| of the group that they are in."""
    ranges = in_groups(wide(weight).abs(), group).amax(-1).double()
    if group == 0 or weight.shape[1] % group == 0:
        return ranges.mean().item()
    counts = ranges.new_full((group_count(weight.shape[1], group),), group)
    counts[-1] = weight.shape[1] % group
    return (ranges * counts).sum().item() / weight.numel()
