"""Loops over rows in host memory, compiled by numba: decode, Adam, encode, one row after the other.

``host_kernels`` and ``grouping`` call them. The arithmetic is that of ``LazyAdam.update_block`` to the last bit; equal
values are stored as the same bits as by ``formats.py``. All of it runs without the interpreter lock.
"""

# numba has types of its own
# mypy: ignore-errors

from functools import lru_cache

import numba
import numpy as np

from kernels.prefetch import AHEAD, prefetch_row

FP32, BF16, FP8 = range(3)
_FP8_BLOCK = 32
_SUM_ROWS = 256
_u32 = numba.uint32
_compile = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compile
def _mix32(x):
    x = _u32(_u32(x ^ (x >> _u32(16))) * _u32(0x7FEB352D))
    x = _u32(_u32(x ^ (x >> _u32(15))) * _u32(0x846CA68B))
    return _u32(x ^ (x >> _u32(16)))


@_compile
def row_key(row, update, seed):
    low, high = _u32(row & 0xFFFFFFFF), _u32(row >> 32)
    return _mix32(_u32(_mix32(_u32(_mix32(_u32(low + _u32(seed))) ^ high)) ^ _u32(update)))


@_compile
def _draw(key, noise):
    """16 random bits for each column."""
    for c in range(noise.size):
        noise[c] = _mix32(_u32(key + _u32(_u32(c) * _u32(0x9E3779B9)))) & _u32(0xFFFF)


@_compile
def encode_bf16(bits, key, out, noise):
    """The bits of fp32 values to those of bf16; ``noise`` is uint32 scratch of the row's width."""
    _draw(key, noise)
    for c in range(bits.size):
        magnitude = bits[c] & _u32(0x7FFFFFFF)
        rounded = _u32(magnitude + noise[c])
        rounded = rounded if rounded < _u32(0x7F7FFFFF) else _u32(0x7F7FFFFF)
        special = _u32(magnitude | _u32(0x400000)) if magnitude > _u32(0x7F800000) else magnitude
        kept = rounded if magnitude < _u32(0x7F800000) else special
        out[c] = _u32(_u32(bits[c] & _u32(0x80000000)) | kept) >> _u32(16)


@_compile
def decode_bf16(codes, bits):
    """The bits of bf16 to those of fp32."""
    for c in range(bits.size):
        bits[c] = _u32(codes[c]) << _u32(16)


@_compile
def encode_fp8(w, key, codes, exponents, noise, scaled, scaled_bits, inverse, inverse_bits):
    """fp32 values to the bits of e4m3 and the exponents of their blocks' scales; the last five are scratch.

    ``scaled_bits`` and ``inverse_bits`` are the same memory as ``scaled`` and ``inverse``, seen as uint32.
    """
    _draw(key, noise)
    for block in range(exponents.size):
        start, stop = block * _FP8_BLOCK, (block + 1) * _FP8_BLOCK
        largest = np.float32(0)
        for c in range(start, stop):
            largest = max(largest, abs(w[c]))
        scaled[start] = max(largest / np.float32(448), np.float32(1e-30))
        exponent = min(max(_u32(scaled_bits[start] + _u32(0x7FFFFF)) >> _u32(23), _u32(1)), _u32(253))
        exponents[block] = exponent
        inverse_bits[start] = _u32(_u32(254) - exponent) << _u32(23)
        scale = inverse[start]
        for c in range(start, stop):
            scaled[c] = w[c] * scale
    for c in range(w.size):  # a step is a value's power of two, at least 2^-6, over 2^3
        power = _u32(scaled_bits[c] & _u32(0x7FFFFFFF)) >> _u32(23)
        power = power if power > _u32(121) else _u32(121)
        inverse_bits[c] = _u32(_u32(257) - power) << _u32(23)
    for c in range(w.size):
        power = _u32(scaled_bits[c] & _u32(0x7FFFFFFF)) >> _u32(23)
        power = power if power > _u32(121) else _u32(121)
        steps = _u32(np.floor(abs(scaled[c]) * inverse[c] + np.float32(noise[c]) * np.float32(2.0**-16)))
        # 8 to 15 steps are a mantissa of 3 bits, 16 are 8 of the next power, fewer than 8 have no power
        code = _u32(_u32(_u32(power - _u32(121)) << _u32(3)) + steps)
        sign = _u32(_u32(scaled_bits[c] >> _u32(24)) & _u32(0x80))
        codes[c] = _u32(code | sign) if abs(scaled[c]) <= np.float32(448) else _u32(0x7F)


@_compile
def decode_fp8(codes, exponents, values256, w, scale, scale_bits):
    """The bits of e4m3 and the exponents of their blocks' scales to fp32 values; the last two are scratch."""
    for block in range(exponents.size):
        scale_bits[0] = _u32(exponents[block]) << _u32(23)
        for c in range(block * _FP8_BLOCK, (block + 1) * _FP8_BLOCK):
            w[c] = values256[codes[c]] * scale[0]


@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def _square_sum(g, u, grad_scale):
    total = np.float32(0)
    for c in range(g.shape[1]):
        total += (g[u, c] * grad_scale) * (g[u, c] * grad_scale)
    return total


@_compile
def _adam_row(w, m, v, r, g, u, factor, floor, grad_scale, new1, beta2, new2, keep):
    """Row 0 of ``w``, r of the moments, u of the gradients: with indices the loops are vectorised, on views not."""
    for c in range(w.shape[1]):
        x = g[u, c] * grad_scale
        mean = m[r, c] + (x - m[r, c]) * new1
        square = v[r, c] * beta2 + x * x * new2
        m[r, c], v[r, c] = mean, square
        w[0, c] = w[0, c] * keep - mean * factor / (np.sqrt(square) + floor)


@_compile
def _rowwise_adam_row(w, m, v, r, g, u, factor, floor, grad_scale, new1, beta2, new2, keep):
    """As ``_adam_row``, with one second moment for the row: ``v`` has one column."""
    width = w.shape[1]
    v[r, 0] = v[r, 0] * beta2 + _square_sum(g, u, grad_scale) / np.float32(width) * new2
    denominator = np.sqrt(v[r, 0]) + floor
    for c in range(width):
        m[r, c] += (g[u, c] * grad_scale - m[r, c]) * new1
        w[0, c] = w[0, c] * keep - m[r, c] * factor / denominator


@lru_cache
def adam_rows(form, row_wise):
    """The loop of one step, for a format, and one second moment a value or one a row; see ``LazyAdam``.

    Each is compiled by itself: a loop that asks at every row which of them it is was not vectorised (rows of 64 fp32
    values that lie in the cache: 22 ns each, not 64).
    """

    @_compile
    def loop(
        weight, exponents, values256, mean, square, step, rows, ids, grads,
        corrections, rate, grad_scale, new1, beta2, new2, eps, keep, seed,
    ):  # fmt: skip
        width, last = mean.shape[1], corrections.shape[1] - 1
        w, scaled = np.empty((1, width), np.float32), np.empty(width, np.float32)
        inverse, noise = np.empty(width, np.float32), np.empty(width, np.uint32)
        # the same memory seen as bits: a view made inside a loop over columns would keep it from being vectorised
        w_bits, scaled_bits, inverse_bits = w[0].view(np.uint32), scaled.view(np.uint32), inverse.view(np.uint32)
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
            if form == FP32:
                for c in range(width):
                    w[0, c] = weight[r, c]
            elif form == BF16:
                decode_bf16(weight[r], w_bits)
            else:
                decode_fp8(weight[r], exponents[r], values256, w[0], scaled, scaled_bits)
            if row_wise:
                _rowwise_adam_row(w, mean, square, r, grads, u, factor, floor, grad_scale, new1, beta2, new2, keep)
            else:
                _adam_row(w, mean, square, r, grads, u, factor, floor, grad_scale, new1, beta2, new2, keep)
            if form == FP32:
                for c in range(width):
                    weight[r, c] = w[0, c]
                continue
            key = row_key(ids[u], step[r], seed)
            if form == BF16:
                encode_bf16(w_bits, key, weight[r], noise)
            else:
                encode_fp8(w[0], key, weight[r], exponents[r], noise, scaled, scaled_bits, inverse, inverse_bits)

    return loop


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def sinkhorn_sums(g, norm, c2, r2, sums):
    """r2[a] = 1 / sum_w (g / norm)^2 c2, and the sums over rows of r2 (g / norm)^2: one pass. ``sums`` is fp64."""
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
    """The loop rows -= diag(scale_rows) g diag(scale_columns) for a format; ``update`` numbers the update."""

    @_compile
    def loop(weight, exponents, values256, rows, ids, g, scale_rows, scale_columns, update, seed):
        width = g.shape[1]
        w, scaled = np.empty(width, np.float32), np.empty(width, np.float32)
        inverse, noise = np.empty(width, np.float32), np.empty(width, np.uint32)
        w_bits, scaled_bits, inverse_bits = w.view(np.uint32), scaled.view(np.uint32), inverse.view(np.uint32)
        for u in range(rows.size):
            r, ahead = rows[u], rows[min(u + AHEAD, rows.size - 1)]
            prefetch_row(weight, ahead)
            if form == FP32:
                for c in range(width):
                    weight[r, c] -= g[u, c] * scale_rows[u] * scale_columns[c]
                continue
            key = row_key(ids[u], update, seed)
            if form == BF16:
                decode_bf16(weight[r], w_bits)
            else:
                prefetch_row(exponents, ahead)
                decode_fp8(weight[r], exponents[r], values256, w, scaled, scaled_bits)
            for c in range(width):
                w[c] -= g[u, c] * scale_rows[u] * scale_columns[c]
            if form == BF16:
                encode_bf16(w_bits, key, weight[r], noise)
            else:
                encode_fp8(w, key, weight[r], exponents[r], noise, scaled, scaled_bits, inverse, inverse_bits)

    return loop


@_compile
def read_fp8(codes, exponents, values256, rows, out):
    """out[u] = the fp32 values of row rows[u]."""
    scale = np.empty(1, np.float32)
    scale_bits = scale.view(np.uint32)
    for u in range(rows.size):
        ahead = rows[min(u + AHEAD, rows.size - 1)]
        prefetch_row(codes, ahead)
        prefetch_row(exponents, ahead)
        decode_fp8(codes[rows[u]], exponents[rows[u]], values256, out[u], scale, scale_bits)


@_compile
def split_keys(keys, bits, rows, order, starts, inverse):
    """Sorted keys, row << bits | position, to ``Groups``' arrays; returns the number of distinct rows."""
    last, count, mask = np.int64(-1), 0, (np.int64(1) << bits) - 1
    for j in range(keys.size):
        row, position = keys[j] >> bits, keys[j] & mask
        if row != last:
            rows[count], starts[count], last = row, j, row
            count += 1
        order[j], inverse[position] = position, count - 1
    return count
