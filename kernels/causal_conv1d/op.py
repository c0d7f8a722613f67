"""Depthwise causal convolution: argument checks, the choice of the path, and the library ops of the
Triton kernels.

Legend: B batch, L length, D channels, K taps, Z = (K - 1) * dilation inputs before the row.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.causal_conv1d.cpu import causal_conv1d_cpu
from kernels.checks import check_devices, check_documents, check_floats, check_writable

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
    backend: Backend | None = None,
) -> Any:
    """Convolve each channel with its own taps, reading the present and earlier inputs of the same
    document only.

    y[t] = act(bias + sum_k weight[:, k] x[t - (K - 1 - k) dilation]). Sums are in fp32 (fp64 for
    fp64 inputs). Deterministic from run to run, on a CPU for a fixed number of threads. Every
    tensor but ``seq_idx`` carries gradient, final states included.

    Args:
        x_BLD: (B, L, D), any float dtype and strides; D contiguous is fast (a view into a wide
            projection is).
        weight_DK: (D, K), K from 1 to 8; the last tap meets the present input.
        bias: (D,) or None.
        seq_idx: (B, L) int32 from 0, never decreasing along a row: taps never cross from a document
            into the next.
        initial_states: (B, Z, D), the inputs before the row; they belong to the row's first
            document.
        return_final_states: also return (B, Z, D), the last inputs, zero where they belong to an
            earlier document.
        activation: None or "silu".
        dilation: distance of neighbouring taps, at least 1.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        y (B, L, D) in the dtype of x, or (y, final states).

    Raises:
        ValueError: a shape, dtype, device, width, dilation or activation outside of the above, or
            the backend cannot.
    """
    if x_BLD.ndim != 3:
        raise ValueError(f"x_BLD: got {tuple(x_BLD.shape)}, expected (B, L, D)")
    B, L, D = x_BLD.shape
    check_filter(weight_DK, bias, D, activation, dilation)
    if seq_idx is not None and (
        seq_idx.shape != (B, L) or seq_idx.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"seq_idx: got {seq_idx.dtype} {tuple(seq_idx.shape)}, expected int32 of shape {(B, L)}"
        )
    check_states("initial_states", initial_states, (B, (weight_DK.shape[1] - 1) * dilation, D))
    check_floats(
        x_BLD=x_BLD,
        weight=weight_DK,
        bias=bias,
        initial_states=initial_states,
    )
    check_devices(
        x_BLD=x_BLD, weight=weight_DK, bias=bias, seq_idx=seq_idx, initial_states=initial_states
    )
    check_documents(seq_idx)
    silu = activation == "silu"
    if use_triton(backend, x_BLD):
        y_BLD, final_BZD, _ = causal_conv1d_fwd(
            x_BLD, weight_DK, bias, seq_idx, initial_states, dilation, silu, return_final_states
        )
        return (y_BLD, final_BZD) if return_final_states else y_BLD
    y_BLD, final_BZD = causal_conv1d_cpu(
        x_BLD, weight_DK, bias, seq_idx, initial_states, silu, dilation, return_final_states
    )
    return y_BLD if final_BZD is None else (y_BLD, final_BZD)


def causal_conv1d_step(
    x_BD: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    dilation: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """One decoding step of ``causal_conv1d``; no gradient.

    Args:
        x_BD: (B, D), the next input.
        conv_state: (B, Z, D), the last inputs, oldest first (the final states of
            ``causal_conv1d``); updated in place.
        weight: (D, K).
        bias: (D,) or None.
        activation: None or "silu".
        dilation: distance of neighbouring taps.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        y (B, D) in the dtype of x.

    Raises:
        ValueError: a shape, stride, dtype, device, width, dilation or activation that does not fit,
            or the backend cannot.
    """
    if x_BD.ndim != 2:
        raise ValueError(f"x_BD: got {tuple(x_BD.shape)}, expected (B, D)")
    check_filter(
        weight,
        bias,
        x_BD.shape[1],
        activation,
        dilation,
    )
    check_states(
        "conv_state", conv_state, (x_BD.shape[0], (weight.shape[1] - 1) * dilation, x_BD.shape[1])
    )
    check_floats(
        x_BD=x_BD,
        conv_state=conv_state,
        weight=weight,
        bias=bias,
    )
    check_devices(
        x_BD=x_BD,
        conv_state=conv_state,
        weight=weight,
        bias=bias,
    )
    check_writable("conv_state", conv_state)
    strided = "" if conv_state.stride(-1) == 1 else "a conv_state whose channels are not contiguous"
    with torch.no_grad():
        if use_triton(backend, x_BD, strided):
            return causal_conv1d_step_(
                x_BD, conv_state, weight, bias, dilation, activation == "silu"
            )
        dtype = torch.promote_types(x_BD.dtype, torch.float32)
        window = torch.cat((conv_state, x_BD[:, None].to(conv_state.dtype)), 1)
        # An einsum makes D products of it.
        y_BD = (window[:, ::dilation].to(dtype) * weight.to(dtype).T).sum(1)
        if bias is not None:
            y_BD += bias.to(dtype)
        conv_state.copy_(window[:, 1:])
        return (F.silu(y_BD) if activation == "silu" else y_BD).to(x_BD.dtype)


@torch.library.custom_op("engramba::causal_conv1d_fwd", mutates_args=())
def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    before: Tensor | None,
    dilation: int,
    silu: bool,
    return_final: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), final states (B, Z, D) and how far back each token may look (B, L); empty what
    is not wanted.
    """
    from kernels.causal_conv1d import triton

    return triton.forward(
        x,
        weight,
        bias,
        seq_idx,
        before,
        dilation,
        silu,
        return_final,
    )


@torch.library.custom_op("engramba::causal_conv1d_bwd", mutates_args=())
def causal_conv1d_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    age: Tensor | None,
    before: Tensor | None,
    dilation: int,
    silu: bool,
) -> list[Tensor]:
    """Gradients of x, weight (fp32), bias (fp32) and initial states, of those that there are."""
    from kernels.causal_conv1d import triton

    return triton.backward(
        dy,
        dfinal,
        x,
        weight,
        bias,
        age,
        before,
        dilation,
        silu,
    )


@torch.library.custom_op("engramba::causal_conv1d_step", mutates_args=("conv_state",))
def causal_conv1d_step_(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    silu: bool,
) -> Tensor:
    """y (B, D); the state moves on in place."""
    from kernels.causal_conv1d import triton_step

    return triton_step.step(
        x,
        conv_state,
        weight,
        bias,
        dilation,
        silu,
    )


@causal_conv1d_fwd.register_fake
def _(x, weight, bias, seq_idx, before, dilation, silu, return_final):
    B, L, D = x.shape
    final = x.new_empty((B, (weight.shape[1] - 1) * dilation, D) if return_final else 0)
    return (
        x.new_empty((B, L, D)),
        final,
        x.new_empty((B, L) if seq_idx is not None else 0, dtype=torch.int32),
    )


@causal_conv1d_bwd.register_fake
def _(dy, dfinal, x, weight, bias, age, before, dilation, silu):
    grads = [x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)]
    if bias is not None:
        grads.append(bias.new_empty(bias.shape, dtype=torch.float32))
    return grads if before is None else [*grads, before.new_empty(before.shape)]


@causal_conv1d_step_.register_fake
def _(x, conv_state, weight, bias, dilation, silu):
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, seq_idx, before, ctx.dilation, ctx.silu, return_final = inputs
    _, final, age = output
    ctx.save_for_backward(
        x,
        weight,
        bias,
        None if seq_idx is None else age,
        before,
    )
    ctx.mark_non_differentiable(*([age] if return_final else [final, age]))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    dy: Tensor | None,
    dfinal: Tensor | None,
    _: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x, weight, bias, age, before = ctx.saved_tensors
    if dy is None:  # only the final states were used
        dy = x.new_zeros(x.shape)
    dx, dweight, *rest = causal_conv1d_bwd(
        dy, dfinal, x, weight, bias, age, before, ctx.dilation, ctx.silu
    )
    dbefore = None if before is None else rest.pop()
    dbias = None if bias is None else rest.pop().to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias, None, dbefore, None, None, None


causal_conv1d_fwd.register_autograd(_backward, setup_context=_save)


def check_filter(
    weight_DK: Tensor,
    bias: Tensor | None,
    D: int,
    activation: str | None,
    dilation: int,
) -> None:
    """Refuse taps, bias, activation or dilation that do not fit D channels."""
    if weight_DK.ndim != 2 or weight_DK.shape[0] != D or not 1 <= weight_DK.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"weight: got {tuple(weight_DK.shape)}, expected (D={D}, K) with K from 1 to "
            f"{MAX_WIDTH}"
        )
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias: got {tuple(bias.shape)}, expected ({D},)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: got {activation!r}, expected None or 'silu'")
    if dilation < 1:
        raise ValueError(f"dilation: got {dilation}, expected at least 1")


def check_states(name: str, states: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Refuse states of another shape than (B, (K - 1) * dilation, D)."""
    if states is not None and states.shape != shape:
        raise ValueError(
            f"{name}: got {tuple(states.shape)}, expected {shape}, that is (B, (K - 1) * "
            "dilation, D)"
        )
