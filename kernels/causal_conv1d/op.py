"""Depthwise causal convolution: argument checks and the choice of the path.

Legend: B batch, L length, D channels, K taps, Z = (K - 1) * dilation inputs before the row.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.cpu import causal_conv1d_cpu

MAX_WIDTH = 8
Activation = Literal["silu"] | None


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: Activation = None,
    dilation: int = 1,
) -> Any:
    """Convolve each channel with its own taps, reading the present and earlier inputs of the same document only.

    y[t] = act(bias + sum_k weight[:, k] x[t - (K - 1 - k) dilation]). Sums are in fp32 (fp64 for fp64 inputs).
    Deterministic for a fixed number of threads. Every tensor but ``seq_idx`` carries gradient, final states included.

    Args:
        x_BLD: (B, L, D), any float dtype and strides; D contiguous is fast (a view into a wide projection is).
        weight_DK: (D, K), K from 1 to 8; the last tap meets the present input.
        bias: (D,) or None.
        seq_idx: (B, L) int32: a new document starts wherever it changes; taps never cross.
        initial_states: (B, Z, D), the inputs before the row; they belong to the row's first document.
        return_final_states: also return (B, Z, D), the last inputs, zero where they belong to an earlier document.
        activation: None or "silu".
        dilation: distance of neighbouring taps, at least 1.

    Returns:
        y (B, L, D) in the dtype of x, or (y, final states).

    Raises:
        ValueError: a shape, dtype, width, dilation or activation outside of the above.
    """
    check_filter(weight_DK, bias, x_BLD.shape[-1], activation, dilation)
    if x_BLD.ndim != 3 or not x_BLD.is_floating_point():
        raise ValueError(f"x_BLD: got {x_BLD.dtype} {tuple(x_BLD.shape)}, expected a float tensor of shape (B, L, D)")
    B, L, D = x_BLD.shape
    if seq_idx is not None and (seq_idx.shape != (B, L) or seq_idx.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"seq_idx: got {seq_idx.dtype} {tuple(seq_idx.shape)}, expected int32 of shape {(B, L)}")
    check_states("initial_states", initial_states, (B, (weight_DK.shape[1] - 1) * dilation, D))
    y_BLD, final_BZD = causal_conv1d_cpu(
        x_BLD, weight_DK, bias, seq_idx, initial_states, activation == "silu", dilation, return_final_states
    )
    return y_BLD if final_BZD is None else (y_BLD, final_BZD)


def causal_conv1d_step(
    x_BD: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    dilation: int = 1,
) -> Tensor:
    """One decoding step of ``causal_conv1d``; no gradient.

    Args:
        x_BD: (B, D), the next input.
        conv_state: (B, Z, D), the last inputs, oldest first (the final states of ``causal_conv1d``); updated in place.
        weight: (D, K).
        bias: (D,) or None.
        activation: None or "silu".
        dilation: distance of neighbouring taps.

    Returns:
        y (B, D) in the dtype of x.

    Raises:
        ValueError: a shape, width, dilation or activation that does not fit.
    """
    check_filter(weight, bias, x_BD.shape[-1], activation, dilation)
    if x_BD.ndim != 2 or not x_BD.is_floating_point():
        raise ValueError(f"x_BD: got {x_BD.dtype} {tuple(x_BD.shape)}, expected a float tensor of shape (B, D)")
    check_states("conv_state", conv_state, (x_BD.shape[0], (weight.shape[1] - 1) * dilation, x_BD.shape[1]))
    with torch.no_grad():
        dtype = torch.promote_types(x_BD.dtype, torch.float32)
        window = torch.cat((conv_state, x_BD[:, None].to(conv_state.dtype)), 1)
        y_BD = torch.einsum("bkd,dk->bd", window[:, ::dilation].to(dtype), weight.to(dtype))
        if bias is not None:
            y_BD += bias.to(dtype)
        conv_state.copy_(window[:, 1:])
        return (F.silu(y_BD) if activation == "silu" else y_BD).to(x_BD.dtype)


def check_filter(weight_DK: Tensor, bias: Tensor | None, D: int, activation: str | None, dilation: int) -> None:
    """Refuse taps, bias, activation or dilation that do not fit D channels."""
    if weight_DK.ndim != 2 or weight_DK.shape[0] != D or not 1 <= weight_DK.shape[1] <= MAX_WIDTH:
        raise ValueError(f"weight: got {tuple(weight_DK.shape)}, expected (D={D}, K) with K from 1 to {MAX_WIDTH}")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias: got {tuple(bias.shape)}, expected ({D},)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: got {activation!r}, expected None or 'silu'")
    if dilation < 1:
        raise ValueError(f"dilation: got {dilation}, expected at least 1")


def check_states(name: str, states: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Refuse states of another shape than (B, (K - 1) * dilation, D)."""
    if states is not None and states.shape != shape:
        raise ValueError(f"{name}: got {tuple(states.shape)}, expected {shape}, that is (B, (K - 1) * dilation, D)")
