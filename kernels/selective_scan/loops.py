"""The selective scan token by token, compiled by numba: one row and a few channels at a time, their
state in L1 cache.

Tensor operations move the state through memory once an operation, about 24 times forward and
backward; these loops hold it and move only the sequences. fp32 on a CPU. They run without the
interpreter lock.

Arrays are C-contiguous, with the shapes of ``cpu.py``: u, dt, y (B, L, D); A (N, D); B, C (B, L, G,
N); reset (B, L); states (B, N, D); ``starts`` (B, chunks, N, D), the states before each CHUNK_LEN
tokens, from which backward recomputes the rest. ``row``, ``group`` and the channels from ``first``
to ``last`` (of that group) are one call's share.
"""

# numba has types of its own
# mypy: ignore-errors

import math

import numba
import numpy as np

from kernels.compiled_loops import compile_loop

CHUNK_LEN = 16

_f32 = np.float32
_i32 = np.int32
_LOG2_E = _f32(math.log2(math.e))
# 2^f for |f| <= 1/2, the Taylor series: the first term left out is below 1e-8.
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7 = (
    _f32(math.log(2) ** k / math.factorial(k)) for k in range(8)
)
# Exponents of normal numbers; a smaller decay counts as 1e-38.
_LEAST = _f32(-126)
_MOST = _f32(127)
# Sums may be reordered, so the source's own order of operations counts: naming a step of the loops
# below has changed bits of gradients. Compare them after each line that changes.
_compile = compile_loop(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


@numba.njit(nogil=True, inline="always")
def _split_decay(fraction_P, bits_P, dt_P, A_log2e_NP, n):
    """exp(dt A) of state n as a fraction times the power of two with these bits (int32).

    This vectorises, where a call of exp would not; NaN stays NaN.
    """
    for p in range(fraction_P.size):
        exponent = dt_P[p] * A_log2e_NP[n, p]
        exponent = _LEAST if exponent < _LEAST else exponent
        exponent = _MOST if exponent > _MOST else exponent
        whole = np.floor(exponent + _f32(0.5))
        f = exponent - whole
        fraction_P[p] = _E0 + f * (
            _E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * (_E6 + f * _E7)))))
        )
        bits_P[p] = (_i32(whole) + _i32(127)) << _i32(23)


@_compile
def scan(u, dt, A, B, C, reset, state, y, starts, row, group, first, last):
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = C_t · h_t;
    ``state`` becomes the last one.
    """
    length = u.shape[1]
    num_states = A.shape[0]
    width = last - first
    A_log2e = A[:, first:last] * _LOG2_E
    h = state[row, :, first:last].copy()
    dt_t, x_t, y_t, fraction = np.empty((4, width), np.float32)
    bits = np.empty(width, np.int32)
    power = bits.view(np.float32)  # the same memory
    for t in range(length):
        if reset[row, t]:
            h[:] = 0
        if t % CHUNK_LEN == 0:
            starts[row, t // CHUNK_LEN, :, first:last] = h
        dt_t[:] = dt[row, t, first:last]
        x_t[:] = u[row, t, first:last]
        for p in range(width):
            x_t[p] *= dt_t[p]
            y_t[p] = 0
        for n in range(num_states):
            _split_decay(fraction, bits, dt_t, A_log2e, n)
            b = B[row, t, group, n]
            c = C[row, t, group, n]
            for p in range(width):
                h[n, p] = h[n, p] * (fraction[p] * power[p]) + b * x_t[p]
                y_t[p] += c * h[n, p]
        y[row, t, first:last] = y_t
    state[row, :, first:last] = h


@_compile
def scan_gradients(
    u, dt, A, B, C, reset, starts, dy, dstate, du, ddt, dA, dB, dC, row, group, first, last
):
    """Gradients of u, dt, A (B, N, D), B and C; ``dstate`` becomes that of the state before the
    first token.

    ``dB`` and ``dC`` are (B, L, G, N) of these channels alone.
    """
    length = u.shape[1]
    num_states = A.shape[0]
    width = last - first
    A_block = A[:, first:last].copy()
    g = dstate[row, :, first:last].copy()
    A_log2e = A_block * _LOG2_E
    states = np.empty((CHUNK_LEN + 1, num_states, width), np.float32)
    decays = np.empty((CHUNK_LEN, num_states, width), np.float32)
    dt_Q, u_Q, x_Q, dy_Q = np.empty((4, CHUNK_LEN, width), np.float32)
    dt_t, dx_t, ddt_t, fraction = np.empty((4, width), np.float32)
    bits = np.empty(width, np.int32)
    power = bits.view(np.float32)  # the same memory
    dA_block = np.zeros((num_states, width), np.float32)
    dA_chunk = np.empty((num_states, width), np.float32)
    for chunk in range((length - 1) // CHUNK_LEN, -1, -1):
        start = chunk * CHUNK_LEN
        stop = min((chunk + 1) * CHUNK_LEN, length)
        states[0] = starts[row, chunk, :, first:last]
        for q in range(stop - start):
            t = start + q
            dt_t[:] = dt[row, t, first:last]
            dt_Q[q] = dt[row, t, first:last]
            u_Q[q] = u[row, t, first:last]
            dy_Q[q] = dy[row, t, first:last]
            for p in range(width):
                x_Q[q, p] = dt_Q[q, p] * u_Q[q, p]
            for n in range(num_states):
                b = B[row, t, group, n]
                _split_decay(fraction, bits, dt_t, A_log2e, n)
                kept = _f32(0) if reset[row, t] else _f32(1)
                for p in range(width):
                    decay = fraction[p] * power[p] * kept
                    decays[q, n, p] = decay
                    states[q + 1, n, p] = states[q, n, p] * decay + b * x_Q[q, p]
        dA_chunk[:] = 0
        for q in range(stop - start - 1, -1, -1):
            t = start + q
            dx_t[:] = 0
            ddt_t[:] = 0
            # few arrays a loop: with more, the compiler cannot rule out that they overlap, and does
            # not vectorise
            for n in range(num_states):
                b = B[row, t, group, n]
                c = C[row, t, group, n]
                db = _f32(0)
                dc = _f32(0)
                for p in range(width):
                    dh = g[n, p] + c * dy_Q[q, p]
                    g[n, p] = dh
                    dx_t[p] += b * dh
                    db += x_Q[q, p] * dh
                    dc += dy_Q[q, p] * states[q + 1, n, p]
                dB[row, t, group, n] = db
                dC[row, t, group, n] = dc
                for p in range(width):
                    dh = g[n, p] * decays[q, n, p]  # now of the state before
                    g[n, p] = dh
                    ddt_t[p] += dh * states[q, n, p] * A_block[n, p]
                for p in range(width):
                    dA_chunk[n, p] += g[n, p] * states[q, n, p] * dt_Q[q, p]
            for p in range(width):
                ddt_t[p] += dx_t[p] * u_Q[q, p]
                dx_t[p] *= dt_Q[q, p]
            du[row, t, first:last] = dx_t
            ddt[row, t, first:last] = ddt_t
        dA_block += dA_chunk
    dA[row, :, first:last] = dA_block
    dstate[row, :, first:last] = g
