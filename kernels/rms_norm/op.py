"""RMSNorm and its gated form: argument checks, the choice of the path, and the library op of the
Triton kernels.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import FLOATS, check_devices, check_floats
from kernels.rms_norm.cpu import rms_norm_cpu

MAX_TRITON_WIDTH = 65536  # a row of channels is held in registers


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467, eq. 4).

    Computed in fp32 (fp64 for fp64 inputs), the product with the weight included; rounded once, to
    the output's dtype. Deterministic from run to run, on a CPU for a fixed number of threads.

    Args:
        x: (..., D), any float dtype: a residual stream in fp32, say.
        weight: (D,), or more dims that broadcast to the tail of x, such as (S, D) for (..., S, D);
            None for ones.
        eps: added to the mean square.
        out_dtype: dtype of the output; None for that of x.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        y of the shape of x.

    Raises:
        ValueError: x has no last dim, the weight does not broadcast to it, dtypes are not floating,
            devices differ, or the backend cannot.
    """
    check_last_dim(x)
    check_weight(weight, x)
    check_floats(x=x, weight=weight)
    check_devices(x=x, weight=weight)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if out_dtype not in FLOATS:
        raise ValueError(
            f"out_dtype: got {out_dtype}, expected a floating dtype of 16 bits or more"
        )
    return _normalise(x, None, weight, eps, out_dtype, False, backend)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Mamba-2's RMSNormGated (arXiv 2405.21060, section 7): rms_norm(x * silu(z)) * weight within
    groups of channels.

    Computed as ``rms_norm``.

    Args:
        x: (..., D), any float dtype.
        z: (..., D), the gate; its dtype may differ.
        weight: (D,).
        eps: added to the mean square of a group.
        group_size: channels that share a mean square; None for all D.
        norm_before_gate: rms_norm(x) * weight * silu(z) instead.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        y (..., D) in the dtype of x.

    Raises:
        ValueError: shapes or devices differ, dtypes are not floating, group_size does not divide D,
            or the backend cannot.
    """
    check_last_dim(x)
    D = x.shape[-1]
    group_size = D if group_size is None else group_size
    if z.shape != x.shape:
        raise ValueError(f"z: got {tuple(z.shape)}, expected the shape of x {tuple(x.shape)}")
    if weight.shape != (D,):
        raise ValueError(f"weight: got {tuple(weight.shape)}, expected ({D},)")
    check_floats(x=x, z=z, weight=weight)
    check_devices(x=x, z=z, weight=weight)
    if group_size < 1 or D % group_size:
        raise ValueError(f"group_size: got {group_size}, expected a divisor of D={D}")
    groups = (D // group_size, group_size)
    x = x.unflatten(-1, groups)
    z = z.unflatten(-1, groups)
    return _normalise(
        x,
        z,
        weight.view(groups),
        eps,
        x.dtype,
        norm_before_gate,
        backend,
    ).flatten(-2)


def _normalise(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    norm_before_gate: bool,
    backend: Backend | None,
) -> Tensor:
    """Over the last dim of x; the weight broadcasts to x's tail."""
    if not use_triton(
        backend, x, f"a width of {x.shape[-1]}" if x.shape[-1] > MAX_TRITON_WIDTH else ""
    ):
        return rms_norm_cpu(
            x,
            z,
            weight,
            eps,
            out_dtype,
            norm_before_gate,
        )
    tail = x.shape[-max(1, 0 if weight is None else weight.ndim) :]
    flat = (
        -1 if x.numel() else math.prod(x.shape[: x.ndim - len(tail)]),
        math.prod(tail[:-1]),
        tail[-1],
    )
    weight_SD = None if weight is None else weight.expand(tail).reshape(flat[1:])
    y_MSD, _ = rms_norm_fwd(
        x.reshape(flat),
        None if z is None else z.reshape(flat),
        weight_SD,
        eps,
        norm_before_gate,
        out_dtype,
    )
    return y_MSD.view(x.shape)


@torch.library.custom_op("engramba::rms_norm_fwd", mutates_args=())
def rms_norm_fwd(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y (M, S, D) and 1 / rms (M, S) of x, z (M, S, D) and weight (S, D)."""
    from kernels.rms_norm import triton

    return triton.forward(
        x,
        z,
        weight,
        eps,
        norm_before_gate,
        out_dtype,
    )


@torch.library.custom_op("engramba::rms_norm_bwd", mutates_args=())
def rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
    norm_before_gate: bool,
) -> list[Tensor]:
    """Gradients of x, of z and of the weight (fp32), of those that there are."""
    from kernels.rms_norm import triton

    return triton.backward(dy, x, z, weight, rstd, norm_before_gate)


@rms_norm_fwd.register_fake
def _(x, z, weight, eps, norm_before_gate, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@rms_norm_bwd.register_fake
def _(dy, x, z, weight, rstd, norm_before_gate):
    dweight = [] if weight is None else [weight.new_empty(weight.shape, dtype=torch.float32)]
    return [x.new_empty(x.shape), *([] if z is None else [z.new_empty(z.shape)]), *dweight]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, z, weight, _, ctx.norm_before_gate, _ = inputs
    ctx.save_for_backward(x, z, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, weight, rstd = ctx.saved_tensors
    dx, *rest = rms_norm_bwd(dy, x, z, weight, rstd, ctx.norm_before_gate)
    dweight = None if weight is None else rest.pop().to(weight.dtype)
    return dx, rest.pop() if rest else None, dweight, None, None, None


rms_norm_fwd.register_autograd(_backward, setup_context=_save)


def check_last_dim(x: Tensor) -> None:
    """Refuse what has no last dim to normalise."""
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: got {tuple(x.shape)}, expected (..., D) with D >= 1")


def check_weight(weight: Tensor | None, x: Tensor) -> None:
    """Refuse a weight that would not broadcast to the tail of x."""
    if weight is None:
        return
    tail = x.shape[x.ndim - weight.ndim :] if 1 <= weight.ndim <= x.ndim else ()
    if not tail or any(
        have not in (1, want) for have, want in zip(weight.shape, tail, strict=True)
    ):
        raise ValueError(
            f"weight: got {tuple(weight.shape)}, expected what broadcasts to the tail of "
            f"{tuple(x.shape)}"
        )
