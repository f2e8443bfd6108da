"""Operations that are worth more than one implementation: the reference in PyTorch, and faster ones beside it.

An operation is a file, its C++ beside it.  What an implementation does not support the next one does, and the reference
does everything.  Results are the same but for rounding.
"""

from tersely.kernels.attention import causal_attention
from tersely.kernels.choice import reference_only
from tersely.kernels.products import linear
from tersely.kernels.quicker import Quicker
from tersely.kernels.rounding import Rounding, round_block

__all__ = ["Quicker", "Rounding", "causal_attention", "linear", "reference_only", "round_block"]
