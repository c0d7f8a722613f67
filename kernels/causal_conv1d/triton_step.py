"""One decoding step of the convolution on a GPU, in place.

Bound by bytes, and at small batches by its launch: the state is read and written once, taps twice
from L1.

Legend: B rows, D channels, K taps, Z = (K - 1) * dilation inputs of the state, oldest first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import dense_rows, strides_in_units
from kernels.causal_conv1d.triton import load_taps, sigmoid

BLOCK_D = 256
WARPS = 2


@triton.jit
def causal_conv1d_step_kernel(
    x_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    units,
    blocks,
    dilation,
    stride_xb,
    stride_tb,
    stride_tz,
    stride_wd,
    stride_wk,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y (B, D), and the state (B, Z, D) moved on; grid (B x blocks of D). A thread touches its own
    channels only.
    """
    D = units * ALIGN
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    taps, bias = load_taps(
        weight_ptr,
        bias_ptr,
        d,
        mask,
        stride_wd,
        stride_wk,
        HAS_BIAS,
        K,
    )
    state_ptr += b * stride_tb * ALIGN + d
    stride_tz = tl.cast(stride_tz, tl.int64) * ALIGN
    newest = tl.load(x_ptr + b * stride_xb * ALIGN + d, mask=mask, other=0.0).to(
        state_ptr.dtype.element_ty
    )
    y = bias + newest.to(tl.float32) * taps[K - 1]
    for k in tl.static_range(K - 1):
        y += (
            tl.load(state_ptr + k * dilation * stride_tz, mask=mask, other=0.0).to(tl.float32)
            * taps[k]
        )
    if SILU:
        y *= sigmoid(y)
    tl.store(y_ptr + b * D + d, y, mask=mask)
    if K > 1:
        for _ in range(1, (K - 1) * dilation):
            tl.store(state_ptr, tl.load(state_ptr + stride_tz, mask=mask, other=0.0), mask=mask)
            state_ptr += stride_tz
        tl.store(state_ptr, newest, mask=mask)


def step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    silu: bool,
) -> Tensor:
    """y (B, D); the state (B, Z, D), whose channels are contiguous, moves on in place."""
    B, D = x.shape
    x, y = dense_rows(x), torch.empty((B, D), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(D, BLOCK_D)
    if y.numel():
        (*of_state, of_x, units), align = strides_in_units(state, x, y)
        causal_conv1d_step_kernel[(B * blocks,)](
            x,
            state,
            weight,
            bias,
            y,
            units,
            blocks,
            dilation,
            of_x,
            *of_state,
            *weight.stride(),
            HAS_BIAS=bias is not None,
            SILU=silu,
            K=weight.shape[1],
            ALIGN=align,
            BLOCK_D=BLOCK_D,
            num_warps=WARPS,
        )
    return y
