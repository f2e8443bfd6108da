"""x Wᵀ on a processor, by whichever of PyTorch's libraries is quicker; nothing is recorded for gradients.

PyTorch gives products of float32 to MKL, which keeps to 256 bits on processors that it does not take for Intel's, and
products of 16 bits to oneDNN, which asks the processor what it can do.  oneDNN multiplies float32 as well, more than
twice as fast on an EPYC with AVX-512.  Rows have to lie one behind the other: of a transposed matrix it takes a hundred
times as long.

Long sums it rounds three times as coarsely (1e-6 where MKL has 3e-7, of √(Gᵢᵢ Gⱼⱼ) over thousands of tokens), so that
Gram matrices stay with MKL.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tersely.kernels.choice import fast_allowed

QUICKER = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


@torch.no_grad()
def linear(
    input: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias, dtypes and devices all the same; the parameters have PyTorch's names."""
    if not QUICKER or not fast_allowed() or input.dtype != torch.float32 or input.device.type != "cpu":
        return functional.linear(input, weight, bias)
    laid_out = input.contiguous(), weight.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(*laid_out, bias, "none", [], "")
    return product
