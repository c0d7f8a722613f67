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
from kernels.table_rows.codes import FP8, decode_fp8, read_row, row_key, scratch_of, write_row

_SUM_ROWS = 256
_compile = compile_loop(error_model="numpy")
# Part of a row's work: see ``codes``.
_inline = numba.njit(nogil=True, error_model="numpy", inline="always")


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
            read_row(form, weight, exponents, powers, r, scratch)
            if row_wise:
                _rowwise_adam_row(
                    w, mean, square, r, grads, u, factor, floor, grad_scale, new1, beta2, new2, keep
                )
            else:
                _adam_row(
                    w, mean, square, r, grads, u, factor, floor, grad_scale, new1, beta2, new2, keep
                )
            write_row(
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
            read_row(form, weight, exponents, powers, r, scratch)
            for c in range(width):
                w[0, c] -= g[u, c] * scale_rows[u] * scale_columns[c]
            write_row(
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
