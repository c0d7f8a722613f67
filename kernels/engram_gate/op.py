"""Checks and dispatch of the Engram gate, and the library op of the Triton kernels.

Shapes: B batch, L length, S residual streams, D model width.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from kernels.backend import TRITON_DTYPES, Backend, use_triton
from kernels.checks import check_devices, check_floats
from kernels.engram_gate.cpu import EngramGate

MAX_STREAMS = 8  # each is unrolled, and has its sums in registers


def _check(
    h_BLSD: Tensor,
    k_BLSD: Tensor,
    v_BLD: Tensor,
    query_weight_SD: Tensor,
    key_weight_SD: Tensor,
    eps: float,
    masked_BL: Tensor | None,
) -> None:
    if h_BLSD.dim() != 4 or h_BLSD.shape[-1] == 0:
        raise ValueError(
            f"h_BLSD: got shape {tuple(h_BLSD.shape)}, expected four dims (B, L, S, D) with D > 0"
        )
    batch, length, streams, width = h_BLSD.shape
    expected = {
        "k_BLSD": (k_BLSD, (batch, length, streams, width)),
        "v_BLD": (v_BLD, (batch, length, width)),
        "query_weight_SD": (query_weight_SD, (streams, width)),
        "key_weight_SD": (key_weight_SD, (streams, width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
    floats = {"h_BLSD": h_BLSD, **{name: tensor for name, (tensor, _) in expected.items()}}
    check_floats(**floats)
    check_devices(**floats, masked_BL=masked_BL)
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected a positive number")
    if masked_BL is not None and (
        masked_BL.dtype != torch.bool or masked_BL.shape != (batch, length)
    ):
        raise ValueError(
            f"masked_BL: got {masked_BL.dtype} {tuple(masked_BL.shape)}, expected bool "
            f"{(batch, length)}"
        )


@overload
def engram_gate(
    h_BLSD: Tensor,
    k_BLSD: Tensor,
    v_BLD: Tensor,
    query_weight_SD: Tensor,
    key_weight_SD: Tensor,
    eps: float,
    masked_BL: Tensor | None = None,
    return_gate: Literal[False] = False,
    residual: bool = False,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def engram_gate(
    h_BLSD: Tensor,
    k_BLSD: Tensor,
    v_BLD: Tensor,
    query_weight_SD: Tensor,
    key_weight_SD: Tensor,
    eps: float,
    masked_BL: Tensor | None = None,
    *,
    return_gate: Literal[True],
    residual: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...
def engram_gate(
    h_BLSD: Tensor,
    k_BLSD: Tensor,
    v_BLD: Tensor,
    query_weight_SD: Tensor,
    key_weight_SD: Tensor,
    eps: float,
    masked_BL: Tensor | None = None,
    return_gate: bool = False,
    residual: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Memory values, weighted by how well their keys fit the residual stream (arXiv 2601.07372, eq.
    4 to 6).

    For each stream: ``s = <RMSNorm(k), RMSNorm(h)> / sqrt(D)``,
    ``s = sign(s) sqrt(max(|s|, 1e-6))`` (the official demo's signed root, which the paper's
    equation lacks), ``u = sigmoid(s) v``. s = 0 gives a gate of 1/2. The gradient with respect to s
    is 0 where the clamp holds, so it is finite everywhere. The math is fp32, or fp64 when h or k
    are fp64. Run-to-run deterministic, bitwise. First derivatives only.

    Args:
        h_BLSD: residual streams; its dtype may differ from that of k and v.
        k_BLSD: keys of each stream, projected from the memory rows.
        v_BLD: the value that all streams share.
        query_weight_SD, key_weight_SD: weights of the two RMSNorms.
        eps: epsilon of both, positive.
        masked_BL: bool, positions without memory: u and its gradient to every input are zero there,
            even where k and v are not finite. With ``residual`` they give h as it is, and their
            gradient to h alone.
        return_gate: also return the gates (B, L, S) in the math dtype, detached; 0 at masked
            positions.
        residual: return h + u instead of u. The sum is made in the math dtype and rounded once, to
            h's dtype: where h is fp32 and v bf16 it is more exact than adding u, which is rounded
            to bf16 first.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        u (B, L, S, D) in v's dtype, or h + u in h's.

    Raises:
        ValueError: a shape or dtype does not fit, devices differ, eps is not positive, or the
            backend cannot.
    """
    _check(
        h_BLSD,
        k_BLSD,
        v_BLD,
        query_weight_SD,
        key_weight_SD,
        eps,
        masked_BL,
    )
    if use_triton(
        backend,
        h_BLSD,
        _unserved(
            h_BLSD,
            k_BLSD,
            v_BLD,
            query_weight_SD,
            key_weight_SD,
        ),
    ):
        out_BLSD, scalars = engram_gate_fwd(
            h_BLSD, k_BLSD, v_BLD, query_weight_SD, key_weight_SD, eps, masked_BL, residual
        )
        return (out_BLSD, scalars[0]) if return_gate else out_BLSD
    # A zero key scores 0, inside the clamp: nothing flows back through the gate either.
    if masked_BL is not None:
        k_BLSD = k_BLSD.masked_fill(masked_BL[..., None, None], 0.0)
        v_BLD = v_BLD.masked_fill(masked_BL[..., None], 0.0)
    flat = (h_BLSD.flatten(0, 1), k_BLSD.flatten(0, 1), v_BLD.flatten(0, 1))
    out_TSD, gate_TS = EngramGate.apply(
        *flat,
        query_weight_SD,
        key_weight_SD,
        eps,
        residual,
    )
    out_BLSD = out_TSD.view_as(h_BLSD)
    gate_BLS = gate_TS.view(h_BLSD.shape[:3])
    if not return_gate:
        return out_BLSD
    return out_BLSD, gate_BLS if masked_BL is None else gate_BLS.masked_fill(
        masked_BL[..., None], 0.0
    )


def _unserved(h_BLSD: Tensor, *others: Tensor) -> str:
    """What the kernels cannot do of these inputs."""
    if h_BLSD.shape[2] > MAX_STREAMS:
        return f"{h_BLSD.shape[2]} streams"
    wide = [tensor.dtype for tensor in others if tensor.dtype not in TRITON_DTYPES]
    return f"dtype {wide[0]}" if wide else ""


@torch.library.custom_op("engramba::engram_gate_fwd", mutates_args=())
def engram_gate_fwd(
    h: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
    masked: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """u or h + u (B, L, S, D), and (4, B, L, S): gate, score, 1 / rms of h and of k."""
    from kernels.engram_gate import triton

    return triton.forward(
        h,
        k,
        v,
        query_weight,
        key_weight,
        eps,
        masked,
        residual,
    )


@torch.library.custom_op("engramba::engram_gate_bwd", mutates_args=())
def engram_gate_bwd(
    du: Tensor,
    h: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    masked: Tensor | None,
    scalars: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, k, v, and in fp32 (S, D) that of the product of the norms' weights."""
    from kernels.engram_gate import triton

    return triton.backward(
        du,
        h,
        k,
        v,
        query_weight,
        key_weight,
        masked,
        scalars,
        residual,
    )


@engram_gate_fwd.register_fake
def _(h, k, v, query_weight, key_weight, eps, masked, residual):
    return (h if residual else v).new_empty(h.shape), v.new_empty(
        (4, *h.shape[:3]), dtype=torch.float32
    )


@engram_gate_bwd.register_fake
def _(du, h, k, v, query_weight, key_weight, masked, scalars, residual):
    return *(x.new_empty(x.shape) for x in (h, k, v)), h.new_empty(
        query_weight.shape, dtype=torch.float32
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, k, v, query_weight, key_weight, _, masked, ctx.residual = inputs
    ctx.save_for_backward(
        h,
        k,
        v,
        query_weight,
        key_weight,
        masked,
        output[1],
    )
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, du: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    h, k, v, query_weight, key_weight, masked, scalars = ctx.saved_tensors
    dh, dk, dv, dweight = engram_gate_bwd(
        du, h, k, v, query_weight, key_weight, masked, scalars, ctx.residual
    )
    dquery = dweight * key_weight.float()
    dkey = dweight * query_weight.float()
    return dh, dk, dv, dquery.to(query_weight.dtype), dkey.to(key_weight.dtype), None, None, None


engram_gate_fwd.register_autograd(_backward, setup_context=_save)
