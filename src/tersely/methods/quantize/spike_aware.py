"""Integers for weights and inputs, one scale for all of a tensor, except where something spikes.

Every linear computes with a weight on one symmetric grid of b bits, and rounds its input to another one, fixed by the
largest |x| of calibration:

    W' = round(W / s) · s,   s = max|W| / n        x' = round(clip(x / a, ±1) · n) · a / n,   n = 2^(b-1) - 1

That is the cheapest arithmetic there is, and nearly nothing is lost by it at 8 bits, unless a tensor *spikes*: its
largest number stands far above what is usual (`stats.peaks`), and everything usual is rounded to a few levels around
zero.  In models like Llama a few projections read such inputs, down projections of early and late blocks above all; a
weight spikes when the rows before it make such inputs.

There are two ways to keep these from harm.  Here, at the very same bytes: where the spike of the input or that of the
weight exceeds `spike`, the input is rounded to a grid of 16 bits, and every row of the weight gets a scale of its own.
Or in 16 bits altogether, which the allocator `spikes` does for as many linears as the budget allows, those with the
highest spikes first.

Departures: the paper keeps its layers in floats of 16 or 8 bits; which ones, it reads off a plot of the largest values
over depth.  The scale of a weight is stored once a row, two bytes each, which lets both cases be one format.

Source: Maisonnave et al., Precision Where It Matters: A Novel Spike Aware Mixed-Precision Quantization Strategy for
LLaMA-based Language Models, 2025 (arXiv 2504.21553).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersely.errors import NumericalError, RecipeError
from tersely.kinds.quantized import QuantizedLinear, quantized_bytes
from tersely.linalg.grid import Grid, Scales, fit_grid, wide
from tersely.methods.quantize.outliers import metric_of
from tersely.option import Option
from tersely.stats import Gram, Peaks, Statistic, Stats
from tersely.stats.peaks import spike, weight_spike

WIDTHS = (6, 8)
"""Bits that are offered where none were asked for; the paper's."""

POSSIBLE = range(2, 9)

BOUND_BYTES = 4
"""The bound of the input's grid, a float of 32 bits."""

PROTECTED = 16
"""Bits of an input where something spikes."""

SMALLEST = 2.0**-126
"""The least bound: that of an input that was silent throughout, too."""


@dataclass(frozen=True)
class SpikeAware:
    width: int | None = None
    """Bits of weights and inputs, 2 to 8; None offers 6 and 8."""

    spike: float = 30.0
    """Largest number over the usual one, beyond which an input is rounded to 16 bits and rows of a weight get scales
    of their own (no unit); models have linears far above or far below.  With inf there are none."""

    paper: ClassVar[str] = (
        "Maisonnave et al., 2025, Precision Where It Matters: A Novel Spike Aware Mixed-Precision Quantization "
        "Strategy for LLaMA-based Language Models (arXiv 2504.21553)"
    )
    summary: ClassVar[str] = "weights and inputs as integers with one scale for a tensor, except where they spike"
    leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.width is not None and self.width not in POSSIBLE:
            raise RecipeError(f"spike_aware: width {self.width}; wanted 2 to 8")
        if not self.spike > 0:
            raise RecipeError(f"spike_aware: spike {self.spike}; wanted above 0, 30 is usual")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Gram, Peaks)

    def sizes(self, shape: tuple[int, int], itemsize: int) -> Sequence[Option]:
        widths = WIDTHS if self.width is None else (self.width,)
        made = ((width, quantized_bytes(shape, width, 0, zeros=False) + BOUND_BYTES) for width in widths)
        return [Option(0, 0, None), *(Option(width, nbytes, None) for width, nbytes in made)]

    def options(self, weight: Float[Tensor, "out in"], stats: Stats) -> Sequence[Option]:
        """Errors are estimates, tr((W - W') G (W - W')ᵀ) + step² ‖W'‖² / 12: what rounding takes from an input counts
        as noise that is even within a step."""
        whole, *sizes = self.sizes((weight.shape[0], weight.shape[1]), weight.element_size())
        gram, dense = metric_of(stats), wide(weight).double()
        found = [replace(whole, error=((dense @ gram) * dense).sum().item())]
        for size in sizes:
            made = self.compress(weight, stats, size.amount)
            kept = made.to_dense().double()
            off = dense - kept
            step = _bound(stats) / (2 ** ((made.input_bits or PROTECTED) - 1) - 1)
            noise = step**2 / 12 * kept.square().sum().item()
            found.append(replace(size, error=min(((off @ gram) * off).sum().item() + noise, found[0].error or 0.0)))
        return found

    def compress(self, weight: Float[Tensor, "out in"], stats: Stats, amount: int) -> QuantizedLinear:
        if amount not in (POSSIBLE if self.width is None else (self.width,)):
            raise RecipeError(f"spike_aware: {amount!r} bits; wanted {self.width or '2 to 8'}")
        bound = _bound(stats)
        grid = fit_grid(weight, amount, 0, "symmetric")
        protected = spike(*stats[Peaks].mean().tolist()) > self.spike or weight_spike(weight) > self.spike
        if not protected:
            largest = wide(weight).abs().max() / (2 ** (amount - 1) - 1)
            grid = Grid(amount, 0, Scales.of(largest.expand(weight.shape[0], 1)), None)
        made = QuantizedLinear.from_codes(grid.nearest(weight), grid, weight.dtype)
        made.round_input(PROTECTED if protected else amount, bound)
        return made


def _bound(stats: Stats) -> float:
    bound = stats[Peaks].mean()[0].item()
    if not math.isfinite(torch.tensor(bound, dtype=torch.float32).item()):
        raise NumericalError("the largest input is not finite in float32; calibrate in float32 or bfloat16")
    return max(bound, SMALLEST)
