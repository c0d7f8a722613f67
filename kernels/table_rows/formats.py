"""How a row is written down: fp32; bf16; fp8 e4m3 with one power-of-two scale for 32 values.

The short formats have no master copy, so they are rounded stochastically: up or down at random, so
that the mean is the value itself and updates below half a unit are not lost. The random bits are a
hash of (seed, row, number of the row's update, column): the same on every layout and after a
resume, with no generator to save.

Shape suffixes: U rows, W row width, K blocks of 32 values.
"""

import torch
from torch import Tensor

FP8_BLOCK = 32
FP8_MAX = 448.0
_MASK = 0xFFFFFFFF
_BF16_MAX_BITS = 0x7F7FFFFF


def random_bits(keys_U: Tensor, width: int) -> Tensor:
    """(U, W) int64 in 0 .. 65535: the mixer lowbias32 (C. Wellons, "Prospecting for hash
    functions") of key + column.

    Args:
        keys_U: (U,) int64 in 0 .. 2^32 - 1, from ``row_keys``.
    """
    columns_W = torch.arange(width, device=keys_U.device) * 0x9E3779B9
    return _mix32((keys_U[:, None] + columns_W) & _MASK) & 0xFFFF


def row_keys(rows_U: Tensor, updates_U: Tensor, seed: int) -> Tensor:
    """(U,) int64 in 0 .. 2^32 - 1: one key for each (global row, number of its update, seed)."""
    low = rows_U & _MASK
    high = rows_U >> 32
    return _mix32(_mix32(_mix32((low + seed) & _MASK) ^ high) ^ (updates_U.long() & _MASK))


def _mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def to_bf16(values_UW: Tensor, keys_U: Tensor) -> Tensor:
    """(U, W) bf16 of fp32 values, stochastically rounded; never to infinity. NaN and infinity stay
    what they are.
    """
    bits = values_UW.view(torch.int32).long() & _MASK
    magnitude = (bits & 0x7FFFFFFF) + random_bits(keys_U, values_UW.shape[1])
    rounded = (bits & 0x80000000) | magnitude.clamp_max(_BF16_MAX_BITS)
    kept = torch.where(values_UW.isfinite(), rounded, bits | ((bits & 0x7FFFFF) != 0) * 0x400000)
    return (kept >> 16).to(torch.int16).view(torch.bfloat16)


def to_fp8(values_UW: Tensor, keys_U: Tensor) -> tuple[Tensor, Tensor]:
    """(U, W) uint8, the bits of e4m3, and (U, K) uint8, the exponents of the blocks' scales
    2^(exponent - 127).

    The scale is the smallest power of two that brings a block's largest value to 448 or below.
    """
    blocks_UKX = values_UW.unflatten(1, (-1, FP8_BLOCK))
    limit_UK = blocks_UKX.abs().amax(-1).div_(FP8_MAX).clamp_(1e-30)
    exponent_UK = ((limit_UK.view(torch.int32).long() + 0x7FFFFF) >> 23).clamp_(1, 253)
    y = (blocks_UKX * _power(127 - exponent_UK)[..., None]).flatten(1)
    unit = _power(((y.abs().view(torch.int32).long() >> 23) - 127).clamp_min(-6) - 3)
    steps = torch.floor(y.abs() / unit + random_bits(keys_U, values_UW.shape[1]).float() / 65536)
    rounded = torch.copysign(steps * unit, y).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8), exponent_UK.to(torch.uint8)


def from_fp8(codes_UW: Tensor, exponents_UK: Tensor, dtype: torch.dtype) -> Tensor:
    """(U, W) in ``dtype``; exact in bf16 and fp32."""
    values = codes_UW.view(torch.float8_e4m3fn).float().unflatten(1, (-1, FP8_BLOCK))
    return (values * _power(exponents_UK.long() - 127)[..., None]).flatten(1).to(dtype)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, for normal numbers, from its bits."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
