"""Loops over rows in host memory, compiled by numba: decode, Adam, encode, one row after the other.

``host`` and the grouping of ids call them. The arithmetic is that of ``reference.adam`` to the
last bit; equal values are stored as the same bits as by ``formats.py``. All of it runs without
the interpreter lock.
"""

# numba has types of its own
# mypy: ignore-errors

from functools import lru_cache

import numba
import numpy as np

from kernels.compiled_loops import compile_loop
from kernels.prefetch import AHEAD, prefetch_row

FP32, BF16, FP8 = range(3)
_SUM_ROWS = 256
_u32 = numba.uint32
_compile = compile_loop(error_model="numpy")
# Parts of a row's work. A call passes seven numbers for each array: of a row of 64 values that is
# most of the time.
_inline = numba.njit(nogil=True, error_model="numpy", inline="always")


@_inline
def _mix32(x):
    x = _u32(_u32(x ^ (x >> _u32(16))) * _u32(0x7FEB352D))
    x = _u32(_u32(x ^ (x >> _u32(15))) * _u32(0x846CA68B))
    return _u32(x ^ (x >> _u32(16)))


@_inline
def row_key(row, update, seed):
    low = _u32(row & 0xFFFFFFFF)
    high = _u32(row >> 32)
    return _mix32(_u32(_mix32(_u32(_mix32(_u32(low + _u32(seed))) ^ high)) ^ _u32(update)))


@_inline
def _draw(key, noise):
    """16 random bits for each column."""
    for c in range(noise.size):
        noise[c] = _mix32(_u32(key + _u32(_u32(c) * _u32(0x9E3779B9)))) & _u32(0xFFFF)


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
        largest = _u32(
            0
        )  # fp32's bits: above 0 they have the numbers' order, and integers' maximum is vectorised
        for j in range(size):
            magnitude = _u32(w_bits[0, k, j] & _u32(0x7FFFFFFF))
            largest = magnitude if magnitude > largest else largest
        inverse_bits[k, 0] = largest
        inverse[k, 0] = max(inverse[k, 0] / np.float32(448), np.float32(1e-30))
        exponent = min(
            max(_u32(inverse_bits[k, 0] + _u32(0x7FFFFF)) >> _u32(23), _u32(1)), _u32(253)
        )
        exponents[r, k] = exponent
        scale = powers[_u32(254) - exponent]
        for j in range(size):
            scaled[k, j] = w[0, k, j] * scale
        for j in range(size):  # a step is a value's power of two, at least 2^-6, over 2^3
            power = _u32(scaled_bits[k, j] & _u32(0x7FFFFFFF)) >> _u32(23)
            power = power if power > _u32(121) else _u32(121)
            inverse_bits[k, j] = _u32(_u32(257) - power) << _u32(23)
        for j in range(size):
            power = _u32(scaled_bits[k, j] & _u32(0x7FFFFFFF)) >> _u32(23)
            power = power if power > _u32(121) else _u32(121)
            random = np.float32(np.int32(noise[k * size + j])) * np.float32(2.0**-16)
            steps = _u32(np.int32(abs(scaled[k, j]) * inverse[k, j] + random))
            # 8 to 15 steps are a mantissa of 3 bits, 16 are 8 of the next power, fewer than 8 have
            # no power
            code = _u32(_u32(_u32(power - _u32(121)) << _u32(3)) + steps)
            sign = _u32(_u32(scaled_bits[k, j] >> _u32(24)) & _u32(0x80))
            codes[r, k, j] = (
                _u32(code | sign) if abs(scaled[k, j]) <= np.float32(448) else _u32(0x7F)
            )


@_inline
def decode_fp8(codes, exponents, powers, r, w, u, number, number_bits):
    """w[u] (K, X) = the fp32 values of row r; ``number`` is scratch (K, X), with its bits.

    By arithmetic: looking 64 values up in a table of 256 takes 44 ns instead of 8.
    """
    blocks, size = number.shape
    for k in range(blocks):
        for j in range(
            size
        ):  # e4m3's bits in fp32's places; without a power, as if it were 1, which is 2^-6 too much
            magnitude = _u32(codes[r, k, j]) & _u32(0x7F)
            power = magnitude if magnitude > _u32(7) else _u32(8)
            finite = _u32(_u32(_u32(magnitude | power) << _u32(20)) + _u32(120 << 23))
            number_bits[k, j] = finite if magnitude < _u32(0x7F) else _u32(0x7FC00000)
        scale = powers[exponents[r, k]]
        for j in range(size):
            code = _u32(codes[r, k, j])
            excess = np.float32(0) if _u32(code & _u32(0x7F)) > _u32(7) else np.float32(2.0**-6)
            sign = np.float32(1) - np.float32(np.int32(_u32(code >> _u32(7)) << _u32(1)))
            w[u, k, j] = (number[k, j] - excess) * scale * sign


@_inline
def _read(form, weight, exponents, powers, r, scratch):
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
def _write(form, scratch, key, weight, exponents, powers, r):
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


@compile_loop(fastmath={"reassoc"})
def _square_sum(g, u, grad_scale):
    total = np.float32(0)
    for c in range(g.shape[1]):
        total += (g[u, c] * grad_scale) * (g[u, c] * grad_scale)
    return total


@_inline
def _adam_row(w, m, v, r, g, u, factor, floor, grad_scale, new1, beta2, new2, keep):
    """Row 0 of ``w``, r of the moments, u of the gradients: with indices the loops are vectorised,
    on views not.
    """
    for c in range(w.shape[1]):
        x = g[u, c] * grad_scale
        mean = m[r, c] + (x - m[r, c]) * new1
        square = v[r, c] * beta2 + x * x * new2
        m[r, c] = mean
        v[r, c] = square
        w[0, c] = w[0, c] * keep - mean * factor / (np.sqrt(square) + floor)


@_compile
def _rowwise_adam_row(w, m, v, r, g, u, factor, floor, grad_scale, new1, beta2, new2, keep):
    """As ``_adam_row``, with one second moment for the row: ``v`` has one column. Inlined it takes
    45 ns, called 30.
    """
    width = w.shape[1]
    v[r, 0] = v[r, 0] * beta2 + _square_sum(g, u, grad_scale) / np.float32(width) * new2
    denominator = np.sqrt(v[r, 0]) + floor
    for c in range(width):
        mean = m[r, c] + (g[u, c] * grad_scale - m[r, c]) * new1
        m[r, c] = mean
        w[0, c] = w[0, c] * keep - mean * factor / denominator


@lru_cache
def adam_rows(form, row_wise):
    """The loop of one step, for a format, and one second moment a value or one a row; see
    ``LazyAdam``.

    Each is compiled by itself: a loop that asks at every row which of them it is was not vectorised
    (rows of 64 fp32 values that lie in the cache: 22 ns each, not 64).
    """

    @_compile
    def loop(
        weight,
        exponents,
        powers,
        mean,
        square,
        step,
        rows,
        ids,
        grads,
        corrections,
        rate,
        grad_scale,
        new1,
        beta2,
        new2,
        eps,
        keep,
        seed,
    ):
        width = mean.shape[1]
        last = corrections.shape[1] - 1
        scratch = scratch_of(width, max(1, exponents.shape[1]))
        w = scratch[0]
        for u in range(rows.size):
            ahead = rows[min(u + AHEAD, rows.size - 1)]
            prefetch_row(mean, ahead)
            prefetch_row(square, ahead)
            prefetch_row(step, ahead)
            prefetch_row(weight, ahead)
            if form == FP8:
                prefetch_row(exponents, ahead)
            r = rows[u]
            step[r] += 1
            t = min(np.int64(step[r]), last)
            factor = np.float32(rate * corrections[1, t] / corrections[0, t])
            floor = np.float32(eps * corrections[1, t])
            _read(form, weight, exponents, powers, r, scratch)
            if row_wise:
                _rowwise_adam_row(
                    w, mean, square, r, grads, u, factor, floor, grad_scale, new1, beta2, new2, keep
                )
            else:
                _adam_row(
                    w, mean, square, r, grads, u, factor, floor, grad_scale, new1, beta2, new2, keep
                )
            _write(
                form,
                scratch,
                row_key(ids[u], step[r], seed),
                weight,
                exponents,
                powers,
                r,
            )

    return loop


@compile_loop(error_model="numpy", fastmath={"reassoc"})
def sinkhorn_sums(g, norm, c2, r2, sums):
    """r2[a] = 1 / sum_w (g / norm)^2 c2, and the sums over rows of r2 (g / norm)^2: one pass.
    ``sums`` is fp64.
    """
    width = g.shape[1]
    part = np.empty(width, np.float32)  # of few rows, so that fp32 does
    for first in range(0, g.shape[0], _SUM_ROWS):
        part[:] = 0
        for a in range(first, min(first + _SUM_ROWS, g.shape[0])):
            total = np.float32(0)
            for c in range(width):
                x = g[a, c] / norm[a]
                total += x * x * c2[c]
            factor = np.float32(1) / total
            r2[a] = factor
            for c in range(width):
                x = g[a, c] / norm[a]
                part[c] += factor * (x * x)
        for c in range(width):
            sums[c] += part[c]


@lru_cache
def move_rows(form):
    """The loop rows -= diag(scale_rows) g diag(scale_columns) for a format; ``update`` numbers the
    update.
    """

    @_compile
    def loop(weight, exponents, powers, rows, ids, g, scale_rows, scale_columns, update, seed):
        width = g.shape[1]
        scratch = scratch_of(width, max(1, exponents.shape[1]))
        w = scratch[0]
        for u in range(rows.size):
            r = rows[u]
            ahead = rows[min(u + AHEAD, rows.size - 1)]
            prefetch_row(weight, ahead)
            if form == FP8:
                prefetch_row(exponents, ahead)
            _read(form, weight, exponents, powers, r, scratch)
            for c in range(width):
                w[0, c] -= g[u, c] * scale_rows[u] * scale_columns[c]
            _write(
                form,
                scratch,
                row_key(ids[u], update, seed),
                weight,
                exponents,
                powers,
                r,
            )

    return loop


@_compile
def read_fp8(codes, exponents, powers, rows, out):
    """out[u] (K, X) = the fp32 values of row rows[u]."""
    number = np.empty(codes.shape[1:], np.float32)
    number_bits = number.view(np.uint32)
    for u in range(rows.size):
        ahead = rows[min(u + AHEAD, rows.size - 1)]
        prefetch_row(codes, ahead)
        prefetch_row(exponents, ahead)
        decode_fp8(
            codes,
            exponents,
            powers,
            rows[u],
            out,
            u,
            number,
            number_bits,
        )


@_compile
def split_keys(keys, bits, rows, order, starts, inverse):
    """Sorted keys, row << bits | position, to ``Groups``' arrays; returns the number of distinct
    rows.
    """
    last = np.int64(-1)
    count = 0
    mask = (np.int64(1) << bits) - 1
    for j in range(keys.size):
        row = keys[j] >> bits
        position = keys[j] & mask
        if row != last:
            rows[count] = row
            starts[count] = j
            last = row
            count += 1
        order[j] = position
        inverse[position] = count - 1
    return count
