"""Codes of 1 to 8 bits in bytes, row by row, with no bit between them.

A code of b bits that begins at bit 8·k of a row begins byte k, lowest bit first; where it does not fit into the rest of
its byte, its high bits open the next one.  The pattern repeats after  8 / gcd(8, b)  codes, which fill  b / gcd(8, b)
bytes: two codes of 4 bits fill one byte, eight of 3 bits fill three.  Packing and unpacking go through the places of
one pattern, all patterns of all rows at once.

Every row begins a byte of its own, so that rows can be read, cut and joined without unpacking the others.  A row of
`count` codes takes  ⌈count · b / 8⌉  bytes, and the spare bits at its end are zero.
"""

import math

import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor
from torch.nn.functional import pad

WIDEST = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: UInt8[Tensor, "*rows count"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Rows of codes below 2^bits, packed.  Raises ValueError for a code that does not fit."""
    _check(bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    count = codes.shape[-1]
    if bits == WIDEST:
        return codes.clone(memory_format=torch.contiguous_format)
    places, stride = _pattern(bits)
    patterns = -(-count // places)
    spread = pad(codes, (0, patterns * places - count)).unflatten(-1, (patterns, places))
    packed = codes.new_zeros(*codes.shape[:-1], patterns, stride)
    for place in range(places):
        byte, shift = divmod(place * bits, 8)
        packed[..., byte] |= spread[..., place] << shift  # bits beyond the byte fall off
        if shift + bits > 8:
            packed[..., byte + 1] |= spread[..., place] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, count: int) -> UInt8[Tensor, "*rows count"]:
    """The first `count` codes of every row."""
    _check(bits)
    if packed.shape[-1] != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, not {packed.shape[-1]}")
    if bits == WIDEST:
        return packed.clone()
    places, stride = _pattern(bits)
    patterns = -(-count // places)
    spread = pad(packed, (0, patterns * stride - packed.shape[-1])).unflatten(-1, (patterns, stride))
    codes = packed.new_empty(*packed.shape[:-1], patterns, places)
    for place in range(places):
        byte, shift = divmod(place * bits, 8)
        code = spread[..., byte] >> shift
        if shift + bits > 8:
            code |= spread[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., place])
    return codes.flatten(-2)[..., :count]


def index_dtype(highest: int) -> torch.dtype:
    """How numbers from 0 to `highest` are kept in whole bytes; int16 stands for its bits without a sign."""
    return torch.uint8 if highest < 2**8 else torch.int16 if highest < 2**16 else torch.int32


def narrowed(numbers: Int[Tensor, " count"], highest: int) -> Integer[Tensor, " count"]:
    """Numbers up to `highest`, as `index_dtype` keeps them."""
    dtype = index_dtype(highest)
    return (torch.where(numbers < 2**15, numbers, numbers - 2**16) if dtype == torch.int16 else numbers).to(dtype)


def widened(numbers: Integer[Tensor, " count"]) -> Int[Tensor, " count"]:
    """What `narrowed` was given."""
    long = numbers.long()
    return long & 0xFFFF if numbers.dtype == torch.int16 else long


def _pattern(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the places repeat."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _check(bits: int) -> None:
    if not 1 <= bits <= WIDEST:
        raise ValueError(f"codes of {bits} bits; wanted 1 to {WIDEST}")
