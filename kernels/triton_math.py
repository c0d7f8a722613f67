"""Functions that several ops' kernels share. Imported by ``triton.py`` files only."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to fp32's precision at any x, also where 1 + exp(x) rounds to 1."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)  # log(1 + e) = 2 artanh(s), s <= 1/3
    q = s * s
    # artanh(s) / s by its Taylor series, the smallest term first: eight terms reach fp32.
    series = 1 / 13 + q * (1 / 15)
    series = 1 / 11 + q * series
    series = 1 / 9 + q * series
    series = 1 / 7 + q * series
    series = 1 / 5 + q * series
    series = 1 / 3 + q * series
    series = 1 + q * series
    return tl.maximum(x, 0.0) + 2 * s * series
