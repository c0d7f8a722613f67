"""RMSNorm and its gated form: argument checks and the choice of the path."""

import torch
from torch import Tensor

from kernels.rms_norm.cpu import rms_norm_cpu


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467, eq. 4).

    Computed in fp32 (fp64 for fp64 inputs), the product with the weight included; rounded once, to the output's dtype.
    Deterministic for a fixed number of threads.

    Args:
        x: (..., D), any float dtype: a residual stream in fp32, say.
        weight: (D,), or more dims that broadcast to the tail of x, such as (S, D) for (..., S, D); None for ones.
        eps: added to the mean square.
        out_dtype: dtype of the output; None for that of x.

    Returns:
        y of the shape of x.

    Raises:
        ValueError: x is not a float tensor with a last dim, or the weight does not broadcast to it.
    """
    check_float("x", x)
    check_weight(weight, x)
    return rms_norm_cpu(x, None, weight, eps, out_dtype or x.dtype)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Mamba-2's RMSNormGated (arXiv 2405.21060, section 7): rms_norm(x * silu(z)) * weight within groups of channels.

    Computed as ``rms_norm``.

    Args:
        x: (..., D), any float dtype.
        z: (..., D), the gate; its dtype may differ.
        weight: (D,).
        eps: added to the mean square of a group.
        group_size: channels that share a mean square; None for all D.
        norm_before_gate: rms_norm(x) * weight * silu(z) instead.

    Returns:
        y (..., D) in the dtype of x.

    Raises:
        ValueError: shapes differ, or group_size does not divide D.
    """
    check_float("x", x)
    D = x.shape[-1]
    group_size = D if group_size is None else group_size
    if z.shape != x.shape or not z.is_floating_point():
        raise ValueError(
            f"z: got {z.dtype} {tuple(z.shape)}, expected a float tensor of the shape of x {tuple(x.shape)}"
        )
    if weight.shape != (D,):
        raise ValueError(f"weight: got {tuple(weight.shape)}, expected ({D},)")
    if group_size < 1 or D % group_size:
        raise ValueError(f"group_size: got {group_size}, expected a divisor of D={D}")
    groups = (D // group_size, group_size)
    y = rms_norm_cpu(
        x.unflatten(-1, groups), z.unflatten(-1, groups), weight.view(groups), eps, x.dtype, norm_before_gate
    )
    return y.flatten(-2)


def check_float(name: str, x: Tensor) -> None:
    """Refuse what has no last dim to normalise."""
    if x.ndim < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(
            f"{name}: got {x.dtype} {tuple(x.shape)}, expected a float tensor of shape (..., D) with D >= 1"
        )


def check_weight(weight: Tensor | None, x: Tensor) -> None:
    """Refuse a weight that would not broadcast to the tail of x."""
    if weight is None:
        return
    tail = x.shape[x.ndim - weight.ndim :] if 1 <= weight.ndim <= x.ndim else ()
    if not tail or any(have not in (1, want) for have, want in zip(weight.shape, tail, strict=True)):
        raise ValueError(f"weight: got {tuple(weight.shape)}, expected what broadcasts to the tail of {tuple(x.shape)}")
