"""Numbers of one byte whose levels are dense near zero and reach far: the dynamic codebook.

A number in [-1, 1] is stored as a sign, a run of zeros that says in which decade it lies, and a linear fraction in the
bits that are left; the smaller the number, the longer the run, and the fewer bits for the fraction.  Of 8 bits:

    decade  10^-6 ... 10^0,   with 1, 2, 4, ..., 64 fractions in it, at the middles of as many equal parts of [0.1, 1]

for either sign, and 0 and 1 besides: 256 levels.  A level is at most 0.007 off in the highest decade, and the relative
error of a number is at most a third wherever it is above 10^-7.  Entries of singular vectors are roughly normal, so
after division by the largest most of them lie in the highest decade, where the levels are densest.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, section 2.1 (arXiv 2110.02861).
"""

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

DECADES = 7


@cache
def _levels() -> Float[Tensor, " levels"]:
    found = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2**decade
        middles = [0.1 + 0.9 * (part + 0.5) / parts for part in range(parts)]
        found += [sign * middle * 10.0 ** (decade + 1 - DECADES) for middle in middles for sign in (1, -1)]
    return torch.tensor(sorted(found), dtype=torch.float64)


def dynamic_levels(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Float[Tensor, " levels"]:
    """The 256 levels, rising."""
    return _levels().to(device=device, dtype=dtype, copy=True)


def nearest_level(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The number of the nearest level; of two equally near ones the lower.  Values beyond [-1, 1] take the last."""
    levels = dynamic_levels(torch.float64, values.device)
    borders = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values.double().contiguous(), borders).to(torch.uint8)


def levels_of(codes: UInt8[Tensor, "*shape"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """What codes stand for."""
    return dynamic_levels(dtype, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
