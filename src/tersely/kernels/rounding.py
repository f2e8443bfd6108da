"""One block of an error feedback sweep (`linalg.hessian`) whose columns take the nearest levels of a grid.

Column by column a dozen operations of PyTorch are started for a few hundred numbers each; that takes longer than the
sums.  The C++ beside this file runs through all columns of a block with some rows of the weight at a time, on integers
in float32 or float64.  Errors are the reference's but for rounding in the last place, and so are codes.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from tersely.kernels.choice import fast_allowed
from tersely.kernels.native import library

ENTRY = {torch.float32: "round_block_float32", torch.float64: "round_block_float64"}
WORTH_A_THREAD = 2**22
"""Products that take a good part of a millisecond; starting a thread takes a few hundredths."""


Decide = Callable[[int, Tensor], Tensor]
"""(place in the order, the columns from this one to the end of its block, up to date, as rows ``[left, out]``) → the
values ``[out]`` that this column takes."""


@dataclass(frozen=True)
class Block:
    """Columns that are decided together, in the order of the sweep; columns of the weight are rows here."""

    start: int
    """Place of the first."""
    columns: Float[Tensor, "count out"]
    """W."""
    left: Float[Tensor, "count out"]
    """v as far as the blocks before determine it; whoever decides leaves v - w' here."""
    off: Float[Tensor, "count out"]
    """W - W' goes here."""
    follows: Float[Tensor, "count count"]
    """R_ij / R_ii: what an error in column j adds to v_i, for j < i; the rest is nobody's business."""


class Levels(Protocol):
    """What columns are rounded to; see `linalg.grid.Grid`."""

    @property
    def top(self) -> int: ...

    @property
    def integers(self) -> bool: ...

    @property
    def free(self) -> bool: ...

    def codes(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor: ...

    def placed(self, codes: Tensor, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Rounding:
    """A grid laid out column by column, and the codes that a sweep finds."""

    levels: Levels
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
        code = rounding.levels.codes(value, scale, zero)
        codes[column].copy_(code)
        level = rounding.levels.placed(code, value.dtype).sub_(zero).mul_(scale)
        return level if stretch is None else level.mul_(stretch[column])

    one_by_one(decide, block)


def nearest_codes(values: Tensor, scales: Tensor, zeros: Tensor, top: int, *, free: bool = False) -> Tensor:
    """clamp(round(w / s) + z, 0, top), in the dtype of `values`.  Whoever rounds goes through here, bit for bit.

    free: zero points are no codes, and are added before rounding.
    """
    steps = values / scales
    return (steps.add_(zeros).round_() if free else steps.round_().add_(zeros)).clamp_(0, top)


def one_by_one(decide: Decide, block: Block) -> None:
    """A block whose columns are decided one after another."""
    left, inside = block.left, block.follows.T.contiguous()
    # views are made all at once: one by one they would take as long as the sums
    rows = zip(block.columns.unbind(), block.off.unbind(), inside.unbind(), strict=True)
    taken = []
    for i, (column, off, shares) in enumerate(rows):
        taken.append(decide(block.start + i, left[i:]))
        torch.sub(column, taken[i], out=off)
        left[i + 1 :].addr_(shares[i + 1 :], off)
    left -= torch.stack(taken)


def native(rounding: Rounding, block: Block) -> None:
    run = _entry(block.left.dtype)
    assert run is not None, "see _native_supports"
    count, rows = block.columns.shape
    threads = max(1, min(torch.get_num_threads(), count * count * rows // WORTH_A_THREAD))
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
        rounding.levels.top,
        rounding.levels.free,
        threads,
    )


def _native_supports(rounding: Rounding, block: Block) -> bool:
    return (
        fast_allowed()
        and rounding.levels.integers
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
