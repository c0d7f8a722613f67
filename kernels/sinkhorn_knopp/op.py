"""Sinkhorn-Knopp: the mixing matrix of manifold-constrained hyper-connections.

mHC, arXiv 2512.24880 eq. 9.

Legend: N residual streams, ... any leading dims (tokens).
Determinism: bitwise from run to run.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import check_floats
from kernels.sinkhorn_knopp.cpu import SinkhornKnopp

# backward holds a matrix of every step in registers
MAX_STREAMS = 16
MAX_ITERS = 32


def sinkhorn_knopp(
    logits_NN: Tensor,
    num_iters: int = 20,
    eps: float = 1e-6,
    backend: Backend | None = None,
) -> Tensor:
    """Return comb[..., j, k], the weight with which stream j goes to stream k.

    Nearly doubly stochastic, with exact columns. Softmax of the rows + eps, columns normalised,
    then rows and columns ``num_iters - 1`` times, eps in every divisor (DeepSeek TileKernels). comb
    is the *transpose* of the paper's H_res: out_k = sum_j comb[j, k] * stream_j.

    Args:
        logits_NN: (..., N, N), any floating dtype; 16-bit is computed in fp32.
        num_iters: at least 1.
        eps: positive.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        (..., N, N) in fp32 (fp64 for fp64), differentiable in the logits; the backward pass
        computes all steps again.

    Raises:
        ValueError: not square, not floating, out of range, or the backend cannot.
    """
    shape = logits_NN.shape
    square = logits_NN.dim() >= 2 and shape[-1] == shape[-2]
    if not square or shape[-1] == 0:
        raise ValueError(f"logits_NN: got {tuple(shape)}, expected (..., N, N) with N at least 1")
    check_floats(logits_NN=logits_NN)
    if num_iters < 1:
        raise ValueError(f"num_iters: got {num_iters}, expected at least 1")
    if eps <= 0:
        raise ValueError(f"eps: got {eps}, expected a positive number")
    streams = shape[-1]
    logits_TNN = logits_NN.reshape(-1, streams, streams)
    if use_triton(backend, logits_NN, _unserved(streams, num_iters)):
        comb_TNN = sinkhorn_knopp_fwd(logits_TNN, num_iters, eps)
        return comb_TNN.view(shape)
    dtype = torch.promote_types(logits_NN.dtype, torch.float32)
    comb_TNN = SinkhornKnopp.apply(logits_TNN.to(dtype), num_iters, eps)
    return comb_TNN.view(shape)


def _unserved(streams: int, num_iters: int) -> str:
    """What the kernels cannot do of this call; nothing if they can do it all."""
    if streams > MAX_STREAMS:
        return f"{streams} streams"
    if num_iters > MAX_ITERS:
        return f"{num_iters} iterations"
    return ""


@torch.library.custom_op("engramba::sinkhorn_knopp_fwd", mutates_args=())
def sinkhorn_knopp_fwd(logits: Tensor, num_iters: int, eps: float) -> Tensor:
    """Return comb (T, N, N) in fp32 of logits (T, N, N)."""
    from kernels.sinkhorn_knopp import triton

    return triton.forward(logits, num_iters, eps)


@torch.library.custom_op("engramba::sinkhorn_knopp_bwd", mutates_args=())
def sinkhorn_knopp_bwd(
    dcomb: Tensor,
    logits: Tensor,
    num_iters: int,
    eps: float,
) -> Tensor:
    """Return dlogits (T, N, N) from dcomb and the logits."""
    from kernels.sinkhorn_knopp import triton

    return triton.backward(dcomb, logits, num_iters, eps)


@sinkhorn_knopp_fwd.register_fake
def _(logits, num_iters, eps):
    return logits.new_empty(logits.shape, dtype=torch.float32)


@sinkhorn_knopp_bwd.register_fake
def _(dcomb, logits, num_iters, eps):
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.num_iters, ctx.eps = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, dcomb: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    dlogits = sinkhorn_knopp_bwd(
        dcomb,
        logits,
        ctx.num_iters,
        ctx.eps,
    )
    return dlogits, None, None


sinkhorn_knopp_fwd.register_autograd(_backward, setup_context=_save)
