"""Causal attention in float32 on a processor.

PyTorch multiplies every query with all keys of a block of 512 and then forgets what lies ahead: up to that length twice
the work.  The C++ beside this file multiplies only what is seen, with the weights of a few queries in the cache: half
the time at 256 tokens, three quarters at 2048, as exact.  Whatever it does not do, masks, dropout, other dtypes, widths
of heads that are no multiple of 16, PyTorch does.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tersely.kernels.choice import fast_allowed
from tersely.kernels.native import library

CHANNELS = 16
"""A multiple of so many of them fills a vector of any processor."""
WORTH_A_THREAD = 2**22
"""Products that take a good part of a millisecond; starting a thread takes a few hundredths."""


def causal_attention(
    query: Float[Tensor, "batch heads length width"],
    key: Float[Tensor, "batch shared keys width"],
    value: Float[Tensor, "batch shared keys value_width"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads length value_width"]:
    """`torch.nn.functional.scaled_dot_product_attention`, with its parameters; any attention, the causal one faster."""
    plain = is_causal and attn_mask is None and not dropout_p
    if plain and _native_supports(query, key, value, enable_gqa):
        return native(query, key, value, scale)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def native(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    run = _entry()
    assert run is not None, "see _native_supports"
    batch, heads, length, width = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    strides = [stride for tensor in (query, key, value, out) for stride in tensor.stride()[:3]]
    threads = max(1, min(torch.get_num_threads(), query.numel() * length // WORTH_A_THREAD))
    run(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        (ctypes.c_int64 * len(strides))(*strides),
        batch,
        heads,
        heads // key.shape[1],
        length,
        width,
        value.shape[-1],
        width**-0.5 if scale is None else scale,
        threads,
    )
    return out


def _native_supports(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> bool:
    given = (query, key, value)
    return (
        fast_allowed()
        and all(x.dtype == torch.float32 and x.device.type == "cpu" and x.ndim == 4 and x.numel() for x in given)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
        and all(x.stride(3) == 1 and x.shape[3] % CHANNELS == 0 for x in given)
        and key.shape[:3] == value.shape[:3]
        and query.shape[3] == key.shape[3]
        and query.shape[0] == key.shape[0]
        and query.shape[2] == key.shape[2]
        and (query.shape[1] == key.shape[1] or (grouped and query.shape[1] % key.shape[1] == 0))
        and _entry() is not None
    )


@cache
def _entry() -> Callable[..., None] | None:
    found = library("attention", "-ffp-contract=fast")
    return None if found is None or not found.worth_it() else declared(found)


def declared(found: ctypes.CDLL) -> Callable[..., None]:
    """What C++ says of its parameters, said once more."""
    size, address = ctypes.c_int64, ctypes.c_void_p
    run = found.causal_attention
    run.argtypes = (*(address,) * 5, *(size,) * 6, ctypes.c_float, size)
    run.restype = None
    entry: Callable[..., None] = run
    return entry
