"""Tables of levels: small sets of numbers, not evenly spaced, that scaled weights are rounded to.

Weights of a trained linear are nearly normal within a group, and even steps waste levels where few weights are.  A
table has 2^b levels, and a code is a place in it:

    nf4     16 normal quantiles: with p evenly spaced from 1/2 to o = 0.9677083, eight positive ones Φ⁻¹(p) and seven
            negative, and an exact zero, divided by the largest; for scales max|w|
    nf3     the like with 8 levels, as SINQ uses it
    fp4     ±{0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1}, the floats of 4 bits beside nf4; much worse than it
    e2m1    ±{0, 1/2, 1, 3/2, 2, 3, 4, 6}, floats with two bits of exponent and one of mantissa, the elements of MX
            formats; the code is sign and magnitude, as hardware reads it
    sign    -1 and 1, the one table without zero

Between two neighbouring levels the midpoint decides; what lies on it goes to the lower one.  With a scale s, a weight
within the range of the table is off by at most s times half the widest gap.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, section 3 and appendix E
(arXiv 2305.14314), for nf4.
Source: Müller et al., SINQ: Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights, 2025
(arXiv 2509.22944), for nf3.
Source: Rouhani et al., OCP Microscaling Formats (MX) Specification, version 1.0, 2023, section 5.3, for e2m1.
"""

from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
NF3 = (-1.0, -0.53502, -0.24693, 0.0, 0.18334, 0.38199, 0.62299, 1.0)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

LEVELS: dict[str, tuple[float, ...]] = {
    "e2m1": (*E2M1, *(-level for level in E2M1)),
    "fp4": (*FP4, *(-level for level in FP4)),
    "nf3": NF3,
    "nf4": NF4,
    "sign": (-1.0, 1.0),
}
"""Name of a table → its levels, code by code."""


def bits_of(table: str) -> int:
    """Bits of a code."""
    return (len(LEVELS[table]) - 1).bit_length()


def levels_of(table: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Float[Tensor, " levels"]:
    """Code → level."""
    return torch.tensor(LEVELS[table], dtype=dtype, device=device)


def reach_of(table: str) -> float:
    """The largest magnitude of a level."""
    return max(map(abs, LEVELS[table]))


@cache
def _sorted(table: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The midpoints between neighbouring levels, rising, and the codes of the levels beside them.  Of the two zeros of
    a table with signs the positive one is taken."""
    rising = sorted({level: code for code, level in reversed(list(enumerate(LEVELS[table])))}.items())
    midpoints = tuple((low + high) / 2 for (low, _), (high, _) in pairwise(rising))
    return midpoints, tuple(code for _, code in rising)


def nearest_levels(values: Float[Tensor, "*shape"], table: str) -> UInt8[Tensor, "*shape"]:
    """The codes of the levels nearest to scaled weights."""
    midpoints, codes = _sorted(table)
    bounds = torch.tensor(midpoints, dtype=values.dtype, device=values.device)
    places = torch.bucketize(values.contiguous(), bounds, out_int32=True)
    return torch.tensor(codes, dtype=torch.uint8, device=values.device)[places]
