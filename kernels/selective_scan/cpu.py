"""The selective scan in fp32 on a CPU, for autograd: compiled loops (``loops.py``) over rows and
blocks of channels.

Beside the inputs, backward keeps the states before every 16th token: memory follows the inputs, not
L·D·N. The result does not depend on the number of threads.

Shapes: B batch, L length, G groups, D channels, N state size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.threads import for_each

BLOCK_CHANNELS = (
    128  # of one call: its states and decays of 16 tokens take 270 KB at N = 16, in L2 cache
)


def looped_scan(
    u_BLD: Tensor,
    dt_BLD: Tensor,
    A_ND: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    state_BND: Tensor,
    reset_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = C_t · h_t, from ``state_BND``.

    All inputs fp32 on the CPU; ``reset_BL`` (bool) marks the steps that forget h_{t-1}.

    Returns:
        y_BLD and the last state (B, N, D), both differentiable in all floating inputs.
    """
    reset_BL = torch.zeros(u_BLD.shape[:2], dtype=torch.bool) if reset_BL is None else reset_BL
    inputs = (u_BLD, dt_BLD, A_ND, B_BLGN, C_BLGN, state_BND, reset_BL)
    return _LoopedScan.apply(*(x.contiguous() for x in inputs))


class _LoopedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u, dt, A, B, C, state, reset):
        from kernels.selective_scan import loops  # numba: not needed where only cards are

        y = torch.empty_like(u)
        state = state.clone()
        starts = u.new_empty(len(u), -(-u.shape[1] // loops.CHUNK_LEN), *A.shape)
        arrays = _arrays(u, dt, A, B, C, reset, state, y, starts)
        _for_shares(B.shape[2], u, lambda block, *share: loops.scan(*arrays, *share))
        ctx.save_for_backward(u, dt, A, B, C, reset, starts)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dstate):
        from kernels.selective_scan import loops

        u, dt, A, B, C, reset, starts = ctx.saved_tensors
        du = torch.empty_like(u)
        ddt = torch.empty_like(dt)
        dstate = dstate.clone(memory_format=torch.contiguous_format)
        dA = A.new_empty(len(u), *A.shape)
        # each block of channels writes its part: threads do not meet, and the sum has one order
        dB, dC = B.new_empty(2, _num_blocks(u.shape[2] // B.shape[2]), *B.shape)
        arrays = _arrays(
            u,
            dt,
            A,
            B,
            C,
            reset,
            starts,
            dy.contiguous(),
            dstate,
            du,
            ddt,
            dA,
        )
        parts = list(zip(_arrays(*dB), _arrays(*dC), strict=True))
        _for_shares(
            B.shape[2],
            u,
            lambda block, *share: loops.scan_gradients(*arrays, *parts[block], *share),
        )
        return du, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dstate, None


def _for_shares(groups: int, u_BLD: Tensor, task: Callable[..., None]) -> None:
    """``task(block, row, group, first, last)`` for each row and block of a group's channels, in
    torch's threads.
    """
    batch, _, channels = u_BLD.shape
    width = channels // groups
    ends = [(group * width, (group + 1) * width) for group in range(groups)]
    shares = [
        (block, row, group, first, min(first + BLOCK_CHANNELS, end))
        for row in range(batch)
        for group, (start, end) in enumerate(ends)
        for block, first in enumerate(range(start, end, BLOCK_CHANNELS))
    ]
    for_each(lambda share: task(*share), shares)


def _num_blocks(width: int) -> int:
    return -(-width // BLOCK_CHANNELS)


def _arrays(*tensors: Tensor) -> list[Any]:
    return [x.detach().numpy() for x in tensors]
