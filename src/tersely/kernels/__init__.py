"""Operations that are worth more than one implementation: the reference in PyTorch, and faster ones beside it.

An operation is a file, its C++ beside it.  What an implementation does not support the next one does, and the reference
does everything.  Results are the same but for rounding.
"""

from tersely.kernels.attention import causal_attention
from tersely.kernels.choice import reference_only
from tersely.kernels.products import linear
from tersely.kernels.quicker import Quicker
from tersely.kernels.ranges import best_ranges
from tersely.kernels.rounding import Block, Decide, Rounding, nearest_codes, one_by_one, round_block

__all__ = [
    "Block",
    "Decide",
    "Quicker",
    "Rounding",
    "best_ranges",
    "causal_attention",
    "linear",
    "nearest_codes",
    "one_by_one",
    "reference_only",
    "round_block",
]
