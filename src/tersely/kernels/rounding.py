"""One block of an error feedback sweep (`linalg.hessian`) whose columns take the nearest levels of a grid.

Column by column a dozen operations of PyTorch are started for a few hundred numbers each; that takes longer than the
sums.  The C++ beside this file runs through all columns of a block with some rows of the weight at a time, on integers
in float32 or float64.  Errors are the reference's but for rounding in the last place, and so are codes.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from tersely.kernels.choice import fast_allowed
from tersely.kernels.native import library
from tersely.linalg.grid import Grid, group_size
from tersely.linalg.hessian import Block, one_by_one

ENTRY = {torch.float32: "round_block_float32", torch.float64: "round_block_float64"}
WORTH_A_THREAD = 2**22
"""Products that take a good part of a millisecond; starting a thread takes a few hundredths."""


@dataclass(frozen=True)
class Rounding:
    """A grid laid out column by column, and the codes that a sweep finds."""

    grid: Grid
    size: int
    """Columns of a group."""
    order: Int64[Tensor, " in"]
    """Place in the sweep → column of the weight; on the processor."""
    scales: Float[Tensor, "groups out"]
    zeros: Float[Tensor, "groups out"]
    stretch: Float[Tensor, " in"] | None
    """Scales of columns; on the processor."""
    codes: UInt8[Tensor, "in out"]
    """The columns in the order of the weight."""

    @classmethod
    def of(cls, grid: Grid, weight: Float[Tensor, "out in"], order: Int64[Tensor, " in"]) -> Self:
        return cls(
            grid,
            group_size(weight.shape[1], grid.group),
            order.cpu().contiguous(),
            grid.scales.values().to(weight.dtype).T.contiguous(),
            grid.zeros(weight.dtype).T.contiguous(),
            None if grid.columns is None else grid.columns.values().to("cpu", weight.dtype).contiguous(),
            torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device),
        )


def round_block(rounding: Rounding, block: Block) -> None:
    """Fill the codes, errors and rests of a block."""
    (native if _native_supports(rounding, block) else reference)(rounding, block)


def reference(rounding: Rounding, block: Block) -> None:
    places = rounding.order[block.start : block.start + len(block.columns)].tolist()
    stretch = None if rounding.stretch is None else rounding.stretch.tolist()
    # views are made all at once, and writing to one costs half of writing to an index
    scales, zeros, codes = rounding.scales.unbind(), rounding.zeros.unbind(), rounding.codes.unbind()

    def decide(place: int, left: Tensor) -> Tensor:
        column = places[place - block.start]
        scale, zero = scales[column // rounding.size], zeros[column // rounding.size]
        value = left[0] if stretch is None else left[0] / stretch[column]
        code = rounding.grid.codes(value, scale, zero)
        codes[column].copy_(code)
        level = rounding.grid.placed(code, value.dtype).sub_(zero).mul_(scale)
        return level if stretch is None else level.mul_(stretch[column])

    one_by_one(decide, block)


def native(rounding: Rounding, block: Block) -> None:
    run = _entry(block.left.dtype)
    assert run is not None, "see _native_supports"
    count, rows = block.columns.shape
    threads = max(1, min(torch.get_num_threads(), count * count * rows // WORTH_A_THREAD))
    free = rounding.grid.zero is not None and rounding.grid.zero.dtype != torch.uint8
    run(
        count,
        rows,
        block.columns.data_ptr(),
        block.left.data_ptr(),
        block.off.data_ptr(),
        block.follows.data_ptr(),
        block.follows.stride(0),
        rounding.scales.data_ptr(),
        rounding.zeros.data_ptr(),
        rounding.size,
        None if rounding.stretch is None else rounding.stretch.data_ptr(),
        rounding.order[block.start :].data_ptr(),
        rounding.codes.data_ptr(),
        rounding.grid.top,
        free,
        threads,
    )


def _native_supports(rounding: Rounding, block: Block) -> bool:
    return (
        fast_allowed()
        and rounding.grid.table is None
        and block.left.device.type == "cpu"
        and block.left.dtype in ENTRY
        and block.columns.is_contiguous()
        and block.left.is_contiguous()
        and block.off.is_contiguous()
        and block.follows.stride(1) == 1
        and _entry(block.left.dtype) is not None
    )


@cache
def _entry(dtype: torch.dtype) -> Callable[..., None] | None:
    found = library("rounding", "-ffp-contract=off")
    if found is None:
        return None
    entry = getattr(found, ENTRY[dtype])
    size, address = ctypes.c_int64, ctypes.c_void_p
    entry.argtypes = (
        *(size, size, address, address, address, address, size),
        *(address, address, size, address, address, address, size, size, size),
    )
    entry.restype = None
    run: Callable[..., None] = entry
    return run
