"""Sinkhorn-Knopp: the mixing matrix of manifold-constrained hyper-connections (mHC, arXiv 2512.24880 eq. 9).

Legend: N residual streams, ... any leading dims (tokens).
Determinism: bitwise from run to run.
"""

import torch

from kernels.sinkhorn_knopp.cpu import SinkhornKnopp


def sinkhorn_knopp(logits_NN: torch.Tensor, num_iters: int = 20, eps: float = 1e-6) -> torch.Tensor:
    """comb[..., j, k], nearly doubly stochastic, with exact columns: stream j goes to stream k with this weight.

    Softmax of the rows + eps, columns normalised, then rows and columns ``num_iters - 1`` times, eps in every divisor
    (DeepSeek TileKernels). comb is the *transpose* of the paper's H_res: out_k = sum_j comb[j, k] * stream_j.

    Args:
        logits_NN: (..., N, N), any floating dtype; 16-bit is computed in fp32.
        num_iters: at least 1.
        eps: positive.

    Returns:
        (..., N, N) in fp32 (fp64 for fp64), differentiable in the logits; the backward pass computes all steps again.

    Raises:
        ValueError: not square, not floating, or out of range.
    """
    if logits_NN.dim() < 2 or logits_NN.shape[-1] != logits_NN.shape[-2] or logits_NN.shape[-1] == 0:
        raise ValueError(f"logits_NN has shape {tuple(logits_NN.shape)}, expected (..., N, N) with N at least 1")
    if not logits_NN.is_floating_point():
        raise ValueError(f"logits_NN has dtype {logits_NN.dtype}, expected a floating dtype")
    if num_iters < 1:
        raise ValueError(f"num_iters is {num_iters}, expected at least 1")
    if eps <= 0:
        raise ValueError(f"eps is {eps}, expected a positive number")
    logits_NN = logits_NN.to(torch.promote_types(logits_NN.dtype, torch.float32))
    streams = logits_NN.shape[-1]
    return SinkhornKnopp.apply(logits_NN.reshape(-1, streams, streams), num_iters, eps).view_as(logits_NN)
