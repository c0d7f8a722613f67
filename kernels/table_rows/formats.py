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
_SIGN = 0x80000000
_MAGNITUDE = 0x7FFFFFFF
_FRACTION = 0x7FFFFF
_QUIET_NAN = 0x400000


def random_bits(keys_U: Tensor, width: int) -> Tensor:
    """(U, W) int64 in 0 .. 65535: the mixer lowbias32 (C. Wellons, "Prospecting for hash
    functions") of key + column.

    Args:
        keys_U: (U,) int64 in 0 .. 2^32 - 1, from ``row_keys``.
    """
    columns_W = torch.arange(width, device=keys_U.device) * 0x9E3779B9
    places_UW = (keys_U[:, None] + columns_W) & _MASK
    return _mix32(places_UW) & 0xFFFF


def row_keys(rows_U: Tensor, updates_U: Tensor, seed: int) -> Tensor:
    """(U,) int64 in 0 .. 2^32 - 1: one key for each (global row, number of its update, seed)."""
    low = rows_U & _MASK
    high = rows_U >> 32
    updates = updates_U.long() & _MASK
    key = _mix32((low + seed) & _MASK)
    key = _mix32(key ^ high)
    return _mix32(key ^ updates)


def _mix32(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def to_bf16(values_UW: Tensor, keys_U: Tensor) -> Tensor:
    """(U, W) bf16 of fp32 values, stochastically rounded; never to infinity. NaN and infinity stay
    what they are.
    """
    bits = values_UW.view(torch.int32).long() & _MASK
    magnitude = bits & _MAGNITUDE
    magnitude = magnitude + random_bits(keys_U, values_UW.shape[1])
    rounded = (bits & _SIGN) | magnitude.clamp_max(_BF16_MAX_BITS)
    # a NaN whose fraction is cut off would be an infinity
    is_nan = (bits & _FRACTION) != 0
    special = bits | is_nan * _QUIET_NAN
    kept = torch.where(values_UW.isfinite(), rounded, special)
    return (kept >> 16).to(torch.int16).view(torch.bfloat16)


def to_fp8(values_UW: Tensor, keys_U: Tensor) -> tuple[Tensor, Tensor]:
    """(U, W) uint8, the bits of e4m3, and (U, K) uint8, the exponents of the blocks' scales
    2^(exponent - 127).

    The scale is the smallest power of two that brings a block's largest value to 448 or below.
    """
    blocks_UKX = values_UW.unflatten(1, (-1, FP8_BLOCK))
    limit_UK = blocks_UKX.abs().amax(-1).div_(FP8_MAX).clamp_(1e-30)
    limit_bits = limit_UK.view(torch.int32).long()
    exponent_UK = (limit_bits + _FRACTION) >> 23  # of the power of two above
    exponent_UK = exponent_UK.clamp_(1, 253)
    scale_UK = _power(127 - exponent_UK)
    y = (blocks_UKX * scale_UK[..., None]).flatten(1)
    magnitude = y.abs()
    power = (magnitude.view(torch.int32).long() >> 23) - 127
    # e4m3 has three bits below a value's power of two, and no power below 2^-6
    unit = _power(power.clamp_min(-6) - 3)
    random = random_bits(keys_U, values_UW.shape[1]).float() / 65536
    steps = torch.floor(magnitude / unit + random)
    rounded = torch.copysign(steps * unit, y)
    codes_UW = rounded.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes_UW, exponent_UK.to(torch.uint8)


def from_fp8(codes_UW: Tensor, exponents_UK: Tensor, dtype: torch.dtype) -> Tensor:
    """(U, W) in ``dtype``; exact in bf16 and fp32."""
    values = codes_UW.view(torch.float8_e4m3fn).float()
    blocks_UKX = values.unflatten(1, (-1, FP8_BLOCK))
    scale_UK = _power(exponents_UK.long() - 127)
    values = (blocks_UKX * scale_UK[..., None]).flatten(1)
    return values.to(dtype)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, for normal numbers, from its bits."""
    bits = (exponent + 127) << 23
    return bits.to(torch.int32).view(torch.float32)
