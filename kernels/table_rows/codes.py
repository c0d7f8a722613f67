"""How one row is written down and read back, inside loops compiled by numba: the formats of
``formats`` to the last bit, one row after the other.

Everything here is inlined into the loops that use it.

Shape suffixes in words: R rows of the table, W row width, K blocks of X = 32 values.
"""

# numba has types of its own
# mypy: ignore-errors

import numba
import numpy as np

FP32, BF16, FP8 = range(3)
_u32 = numba.uint32
# A call passes seven numbers for each array: of a row of 64 values that is most of the time.
_inline = numba.njit(nogil=True, error_model="numpy", inline="always")


@_inline
def _mix32(x):
    x = _u32(x ^ (x >> _u32(16)))
    x = _u32(x * _u32(0x7FEB352D))
    x = _u32(x ^ (x >> _u32(15)))
    x = _u32(x * _u32(0x846CA68B))
    return _u32(x ^ (x >> _u32(16)))


@_inline
def row_key(row, update, seed):
    low = _u32(row & 0xFFFFFFFF)
    high = _u32(row >> 32)
    key = _mix32(_u32(low + _u32(seed)))
    key = _mix32(_u32(key ^ high))
    return _mix32(_u32(key ^ _u32(update)))


@_inline
def _draw(key, noise):
    """16 random bits for each column."""
    for c in range(noise.size):
        column = _u32(_u32(c) * _u32(0x9E3779B9))
        noise[c] = _mix32(_u32(key + column)) & _u32(0xFFFF)


@_inline
def encode_bf16(bits, key, codes, r, noise):
    """Row r of ``codes`` = bf16's bits of those of fp32 values (1, W); ``noise`` (W,) uint32 is
    scratch.
    """
    _draw(key, noise)
    for c in range(bits.shape[1]):
        magnitude = bits[0, c] & _u32(0x7FFFFFFF)
        rounded = _u32(magnitude + noise[c])
        rounded = rounded if rounded < _u32(0x7F7FFFFF) else _u32(0x7F7FFFFF)
        special = _u32(magnitude | _u32(0x400000)) if magnitude > _u32(0x7F800000) else magnitude
        kept = rounded if magnitude < _u32(0x7F800000) else special
        codes[r, c] = _u32(_u32(bits[0, c] & _u32(0x80000000)) | kept) >> _u32(16)


@_inline
def decode_bf16(codes, r, bits):
    """fp32's bits (1, W) of row r of bf16's."""
    for c in range(bits.shape[1]):
        bits[0, c] = _u32(codes[r, c]) << _u32(16)


@_inline
def scratch_of(width, num_blocks):
    """Room for a row: its fp32 values (1, W), the same memory by blocks (1, K, X), and two more (K,
    X), all three with their bits; and 16 random bits a column (W,).

    Views that are made inside a loop over columns would keep it from being vectorised.
    """
    shape = (num_blocks, width // num_blocks)
    w = np.empty((1, width), np.float32)
    noise = np.empty(width, np.uint32)
    scaled = np.empty(shape, np.float32)
    inverse = np.empty(shape, np.float32)
    bits = w.view(np.uint32)
    scaled_bits = scaled.view(np.uint32)
    inverse_bits = inverse.view(np.uint32)
    blocks = w.reshape((1, *shape))
    blocks_bits = bits.reshape((1, *shape))
    return w, bits, blocks, blocks_bits, scaled, scaled_bits, inverse, inverse_bits, noise


@_inline
def encode_fp8(scratch, key, codes, exponents, powers, r):
    """Row r of ``codes`` (R, K, X), e4m3's bits, and ``exponents`` (R, K), of the blocks' scales,
    from the values in ``scratch``; ``powers`` is 2^(i - 127) for i of 0 to 255.
    """
    _, _, w, w_bits, scaled, scaled_bits, inverse, inverse_bits, noise = scratch
    _draw(key, noise)
    blocks, size = scaled.shape
    for k in range(blocks):
        # fp32's bits: above 0 they have the numbers' order, and integers' maximum is vectorised
        largest = _u32(0)
        for j in range(size):
            magnitude = _u32(w_bits[0, k, j] & _u32(0x7FFFFFFF))
            largest = magnitude if magnitude > largest else largest
        inverse_bits[k, 0] = largest
        inverse[k, 0] = max(inverse[k, 0] / np.float32(448), np.float32(1e-30))
        exponent = _u32(inverse_bits[k, 0] + _u32(0x7FFFFF)) >> _u32(23)
        exponent = max(exponent, _u32(1))
        exponent = min(exponent, _u32(253))
        exponents[r, k] = exponent
        scale = powers[_u32(254) - exponent]
        for j in range(size):
            scaled[k, j] = w[0, k, j] * scale
        # a step is a value's power of two, at least 2^-6, over 2^3
        for j in range(size):
            power = _u32(scaled_bits[k, j] & _u32(0x7FFFFFFF)) >> _u32(23)
            power = power if power > _u32(121) else _u32(121)
            inverse_bits[k, j] = _u32(_u32(257) - power) << _u32(23)
        for j in range(size):
            power = _u32(scaled_bits[k, j] & _u32(0x7FFFFFFF)) >> _u32(23)
            power = power if power > _u32(121) else _u32(121)
            random = np.float32(np.int32(noise[k * size + j])) * np.float32(2.0**-16)
            absolute = abs(scaled[k, j])
            steps = _u32(np.int32(absolute * inverse[k, j] + random))
            # 8 to 15 steps are a mantissa of 3 bits, 16 are 8 of the next power, fewer than 8 have
            # no power
            code = _u32(power - _u32(121)) << _u32(3)
            code = _u32(code + steps)
            sign = _u32(scaled_bits[k, j] >> _u32(24)) & _u32(0x80)
            finite = _u32(code | sign)
            codes[r, k, j] = finite if absolute <= np.float32(448) else _u32(0x7F)


@_inline
def decode_fp8(codes, exponents, powers, r, w, u, number, number_bits):
    """w[u] (K, X) = the fp32 values of row r; ``number`` is scratch (K, X), with its bits.

    By arithmetic: looking 64 values up in a table of 256 takes 44 ns instead of 8.
    """
    blocks, size = number.shape
    for k in range(blocks):
        # e4m3's bits in fp32's places; without a power, as if it were 1, which is 2^-6 too much
        for j in range(size):
            magnitude = _u32(codes[r, k, j]) & _u32(0x7F)
            power = magnitude if magnitude > _u32(7) else _u32(8)
            finite = _u32(magnitude | power) << _u32(20)
            finite = _u32(finite + _u32(120 << 23))
            number_bits[k, j] = finite if magnitude < _u32(0x7F) else _u32(0x7FC00000)
        scale = powers[exponents[r, k]]
        for j in range(size):
            code = _u32(codes[r, k, j])
            magnitude = _u32(code & _u32(0x7F))
            excess = np.float32(0) if magnitude > _u32(7) else np.float32(2.0**-6)
            twice = _u32(code >> _u32(7)) << _u32(1)
            sign = np.float32(1) - np.float32(np.int32(twice))
            w[u, k, j] = (number[k, j] - excess) * scale * sign


@_inline
def read_row(form, weight, exponents, powers, r, scratch):
    """The fp32 values of row r, into ``scratch``."""
    w, bits, blocks, _, scaled, scaled_bits, _, _, _ = scratch
    if form == FP32:
        for c in range(w.shape[1]):
            w[0, c] = weight[r, c]
    elif form == BF16:
        decode_bf16(weight, r, bits)
    else:
        decode_fp8(
            weight,
            exponents,
            powers,
            r,
            blocks,
            0,
            scaled,
            scaled_bits,
        )


@_inline
def write_row(form, scratch, key, weight, exponents, powers, r):
    """Row r = the values in ``scratch``; ``key`` is that of the random bits by which a short format
    rounds.
    """
    w = scratch[0]
    bits = scratch[1]
    if form == FP32:
        for c in range(w.shape[1]):
            weight[r, c] = w[0, c]
    elif form == BF16:
        encode_bf16(bits, key, weight, r, scratch[8])
    else:
        encode_fp8(scratch, key, weight, exponents, powers, r)
