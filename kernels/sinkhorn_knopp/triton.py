"""Sinkhorn-Knopp of many small matrices at once, held in registers through all iterations.

A matrix of N x N logits is read and written once: 8 N^2 bytes forward and 12 N^2 backward, for 2
N^2 and 5 N^2 FLOPs of each normalisation. What takes the time is their chain (39 of them at 20
iterations, each a sum over N neighbours and a division), which many programs hide from each other.
Backward walks the chain again and keeps every matrix of it: one register a value, as long as a
thread has one value of a matrix. No matrix depends on another, nothing is accumulated: bitwise
reproducible.

Legend: T matrices, N x N; rows are dim 1, columns dim 2 of a tile.
"""
# A tuple grows step by step; Triton's compiler knows neither stars in it nor annotations.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

# values, at 4 warps: a row of four a thread, and one value a thread
TILE = 512
BACKWARD_TILE = 128


@triton.jit
def _start(
    logits_ptr,
    T,
    stride_t,
    stride_n,
    stride_m,
    eps,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax of the rows; softmax + eps; offsets in a dense (T, N, N); which values exist."""
    t = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None, None]
    n = tl.arange(0, P)[None, :, None]
    m = tl.arange(0, P)[None, None, :]
    inside = (t < T) & (n < N) & (m < N)
    at = logits_ptr + t * stride_t + n * stride_n + m * stride_m
    logits = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where(inside, logits, -3e38)  # finite, as whole rows are outside
    powers = tl.exp(logits - tl.max(logits, 2, keep_dims=True))
    softmax = tl.where(inside, powers / tl.sum(powers, 2, keep_dims=True), 0.0)
    return softmax, tl.where(inside, softmax + eps, 0.0), (t * N + n) * N + m, inside


@triton.jit
def sinkhorn_knopp_fwd_kernel(
    logits_ptr,
    comb_ptr,
    T,
    stride_t,
    stride_n,
    stride_m,
    eps,
    num_iters,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write comb (T, N, N); grid (blocks of T)."""
    _, x, flat, inside = _start(
        logits_ptr,
        T,
        stride_t,
        stride_n,
        stride_m,
        eps,
        N,
        P,
        BLOCK,
    )
    x = x / (tl.sum(x, 1, keep_dims=True) + eps)
    for _ in range(num_iters - 1):
        x = x / (tl.sum(x, 2, keep_dims=True) + eps)
        x = x / (tl.sum(x, 1, keep_dims=True) + eps)
    tl.store(comb_ptr + flat, x, mask=inside)


@triton.jit
def sinkhorn_knopp_bwd_kernel(
    logits_ptr,
    dcomb_ptr,
    dlogits_ptr,
    T,
    stride_t,
    stride_n,
    stride_m,
    eps,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dlogits (T, N, N); grid (blocks of T).

    Even steps normalise columns (sums over dim 1), odd ones rows.
    """
    softmax, x, flat, inside = _start(
        logits_ptr,
        T,
        stride_t,
        stride_n,
        stride_m,
        eps,
        N,
        P,
        BLOCK,
    )
    dx = tl.load(dcomb_ptr + flat, mask=inside, other=0.0)
    chain = (x,)
    for step in tl.static_range(STEPS):
        x = x / (tl.sum(x, 1 + step % 2, keep_dims=True) + eps)
        chain = chain + (x,)
    for step in tl.static_range(STEPS - 1, -1, -1):
        divisor = tl.sum(chain[step], 1 + step % 2, keep_dims=True) + eps
        dx = (dx - tl.sum(dx * chain[step + 1], 1 + step % 2, keep_dims=True)) / divisor
    dlogits = softmax * (dx - tl.sum(dx * softmax, 2, keep_dims=True))
    tl.store(dlogits_ptr + flat, dlogits, mask=inside)


def forward(logits: Tensor, num_iters: int, eps: float) -> Tensor:
    """Return comb (T, N, N) in fp32 of logits (T, N, N)."""
    T, N, _ = logits.shape
    comb = torch.empty((T, N, N), dtype=torch.float32, device=logits.device)
    P, block = _tile(N, TILE)
    if T:
        sinkhorn_knopp_fwd_kernel[(triton.cdiv(T, block),)](
            logits, comb, T, *logits.stride(), eps, num_iters, N=N, P=P, BLOCK=block, num_warps=4
        )
    return comb


def backward(dcomb: Tensor, logits: Tensor, num_iters: int, eps: float) -> Tensor:
    """Return dlogits (T, N, N) from dcomb and the logits."""
    T, N, _ = logits.shape
    dlogits = torch.empty((T, N, N), dtype=logits.dtype, device=logits.device)
    P, block = _tile(N, BACKWARD_TILE)
    if T:
        sinkhorn_knopp_bwd_kernel[(triton.cdiv(T, block),)](
            logits,
            dcomb.contiguous(),
            dlogits,
            T,
            *logits.stride(),
            eps,
            STEPS=2 * num_iters - 1,
            N=N,
            P=P,
            BLOCK=block,
            num_warps=4,
        )
    return dlogits


def _tile(N: int, values: int) -> tuple[int, int]:
    """N as a power of two, and matrices a tile."""
    P = triton.next_power_of_2(N)
    return P, max(1, values // (P * P))
