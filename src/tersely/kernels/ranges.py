"""Which of several grids of integers rounds each group of a weight best.

The search for ranges (`linalg.grid.fit_grid`) tries eighty grids on every group, a dozen operations each.  The C++
beside this file does them all while a group is in the cache.  Sums are the reference's but for rounding, and so are
choices between grids that are as good as equal.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from tersely.kernels.choice import fast_allowed
from tersely.kernels.native import library
from tersely.kernels.rounding import nearest_codes

NORM = 2.4
"""GPTQ's exponent of the error: outliers count a little more than in squares."""
FLAGS = ("-ffp-contract=fast", "-ffinite-math-only", "-fno-signed-zeros")
AT_ONCE = 2**17
"""Weights of the reference: what a processor's cache holds of the few tensors that it takes."""
WORTH_A_THREAD = 2**18
"""Weights that are tried on grids in a good part of a millisecond; starting a thread takes a few hundredths."""


def best_ranges(
    weight: Float[Tensor, "rows columns"],
    scales: Float[Tensor, "tries rows groups"],
    zeros: Float[Tensor, "tries rows groups"],
    *,
    size: int,
    top: int,
) -> Int64[Tensor, "rows groups"]:
    """The place of the grid with the least Σ|w - w'|^2.4 over the columns of a group, `size` of them or, in the last
    one, what is left; of equally good grids the first.  Levels are 0 to `top` less the zero point, times the scale."""
    fast = fast_allowed() and weight.dtype == torch.float32 and weight.device.type == "cpu" and _entry() is not None
    return (native if fast else reference)(weight, scales, zeros, size=size, top=top)


def reference(weight: Tensor, scales: Tensor, zeros: Tensor, *, size: int, top: int) -> Tensor:
    rows = max(1, AT_ONCE // max(1, weight.shape[1]))
    parts = zip(weight.split(rows), scales.split(rows, 1), zeros.split(rows, 1), strict=True)
    return torch.cat([_best_of_rows(*part, size, top) for part in parts])


def _best_of_rows(weight: Tensor, scales: Tensor, zeros: Tensor, size: int, top: int) -> Tensor:
    _, rows, groups = scales.shape
    grouped = pad(weight, (0, groups * size - weight.shape[1])).view(rows, groups, size)
    least = torch.full_like(scales[0], torch.inf)
    best = torch.zeros_like(least, dtype=torch.int64)
    for tried, (scale, zero) in enumerate(zip(scales[..., None], zeros[..., None], strict=True)):
        off = (grouped - (nearest_codes(grouped, scale, zero, top) - zero).mul_(scale)).abs_()
        # |x|^p by way of logarithms, which is several times faster than as a power
        lost = off.log2_().mul_(NORM).exp2_().sum(-1)
        best.masked_fill_(lost < least, tried)
        torch.minimum(least, lost, out=least)
    return best


def native(weight: Tensor, scales: Tensor, zeros: Tensor, *, size: int, top: int) -> Tensor:
    run = _entry()
    assert run is not None, "asked for by best_ranges alone"
    tries, rows, groups = scales.shape
    weight, scales, zeros = (x.contiguous() for x in (weight, scales, zeros))
    best = torch.empty(rows, groups, dtype=torch.int64)
    threads = max(1, min(torch.get_num_threads(), tries * weight.numel() // WORTH_A_THREAD))
    given = (weight, scales, zeros, best)
    run(*(x.data_ptr() for x in given), rows, weight.shape[1], groups, size, tries, top, threads)
    return best


@cache
def _entry() -> Callable[..., None] | None:
    found = library("ranges", *FLAGS)
    if found is None:
        return None
    run: Callable[..., None] = found.best_ranges
    found.best_ranges.argtypes = (*(ctypes.c_void_p,) * 4, *(ctypes.c_int64,) * 7)
    found.best_ranges.restype = None
    return run
