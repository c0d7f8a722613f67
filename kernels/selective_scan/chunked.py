"""The selective scan with time steps vectorised over chunks: 2·Q steps of C chunks at once for a
block of C·Q tokens.

Step t of all chunks of a block is one operation. The chunks run once from zero, which gives what
each adds to the state; C small steps turn that into the states at their starts; the chunks run
again from those. Every exponent is dt·A <= 0, with no division by a decay and no difference of
cumulative sums, so the result is exact at any decay. Backward does the same in reverse. It keeps
the inputs and the states at the starts of chunks and recomputes the rest: memory follows the
inputs, not L·D·N.

These are plain tensor operations: accelerators run them, and fp64. A CPU runs fp32 in compiled
loops (``cpu.py``).

Shapes: B batch, L length, G groups, P channels of a group (D = G·P), N state size, C chunks of a
block, Q steps of a chunk, M = B·C chunks that advance together. A dim of 1 broadcasts.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LEN = 16
# Elements in one step of a block; the workspace is 3·Q times that. Where a step is smaller, call
# overhead shows (2 cores, B2 L1024 D512 N16, forward and backward: 45 ms at 2^16, 38 at 2^17 and at
# 2^18).
STEP_ELEMENTS = 2**17
# Under 4 chunks the loop would be as long as the sequence; over 64 the steps from chunk to chunk
# would cost more.
MIN_CHUNKS = 4
MAX_CHUNKS = 64


def chunked_scan(
    u_BLD: Tensor,
    dt_BLD: Tensor,
    A_ND: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    state_BND: Tensor,
    reset_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = C_t · h_t, from ``state_BND``.

    All inputs of one dtype (fp32 or fp64) and any strides; ``reset_BL`` (bool) marks the steps that
    forget h_{t-1}.

    Returns:
        y_BLD and the last state (B, N, D), both differentiable in all floating inputs.
    """
    groups = (B_BLGN.shape[2], -1)
    x_BLGP = (u_BLD * dt_BLD).unflatten(2, groups)
    dt_BLGP = dt_BLD.unflatten(2, groups)
    # every step reads A: with P innermost it is vectorised
    A_GNP = A_ND.unflatten(1, groups).transpose(0, 1).contiguous()
    state_BGNP = state_BND.unflatten(2, groups).transpose(1, 2)
    y_BLGP, state_BGNP = _ChunkedScan.apply(
        x_BLGP, dt_BLGP, A_GNP, B_BLGN, C_BLGN, state_BGNP, reset_BL
    )
    return y_BLGP.flatten(2), state_BGNP.transpose(1, 2).flatten(2)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, state, reset):
        ctx.blocks = _blocks(x.shape[1], state.numel())
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        decays = _workspace(x, A, ctx.blocks, CHUNK_LEN)
        state = state.clone()
        starts = []
        for block in ctx.blocks:
            steps = _Steps.of(block, x, dt, A, B, C, reset)
            y_QMGP, starts_MGNP, state = _scan_block(steps, state, decays[:, : steps.num_rows])
            _from_chunks(y_QMGP, out=y[:, block])
            starts.append(starts_MGNP)
        ctx.save_for_backward(x, dt, A, B, C, reset, *starts)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dstate):
        x, dt, A, B, C, reset, *starts = ctx.saved_tensors
        sequences = [
            torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C)
        ]
        dA = torch.zeros_like(A)
        decays = _workspace(x, A, ctx.blocks, CHUNK_LEN)
        states = _workspace(x, A, ctx.blocks, CHUNK_LEN + 1)
        for block, starts_MGNP in reversed(list(zip(ctx.blocks, starts, strict=True))):
            steps = _Steps.of(block, x, dt, A, B, C, reset)
            dy_QMG1P = _to_chunks(dy[:, block])[:, :, :, None]
            block_decays = decays[:, : steps.num_rows]
            block_states = states[:, : steps.num_rows]
            _recompute(steps, starts_MGNP, block_decays, block_states)
            g_MGNP, dstate = _gradient_of_ends(steps, dy_QMG1P, block_decays, dstate)
            dA_block, *parts = _chunk_gradients(
                steps, dy_QMG1P, A, block_decays, block_states, g_MGNP
            )
            dA += dA_block
            for gradient, part_QMG in zip(sequences, parts, strict=True):
                _from_chunks(part_QMG, out=gradient[:, block])
        dx, ddt, dB, dC = sequences
        return dx, ddt, dA, dB, dC, dstate, None


def _blocks(length: int, state_elements: int) -> list[slice]:
    """Ranges of tokens that are scanned at once, the first one the longest."""
    num_chunks = min(max(STEP_ELEMENTS // max(state_elements, 1), MIN_CHUNKS), MAX_CHUNKS)
    block_len = num_chunks * CHUNK_LEN
    return [slice(start, min(start + block_len, length)) for start in range(0, length, block_len)]


def _workspace(x: Tensor, A_GNP: Tensor, blocks: list[slice], num_steps: int) -> Tensor:
    """Uninitialised (steps, M, G, N, P) for the longest block, reused by all: fresh memory costs
    page faults.
    """
    num_chunks = -(-blocks[0].stop // CHUNK_LEN) if blocks else 0
    return torch.empty(
        num_steps, x.shape[0] * num_chunks, *A_GNP.shape, dtype=x.dtype, device=x.device
    )


class _Steps(NamedTuple):
    """One block's inputs in the order in which the steps read them, shaped to broadcast to a state
    (M, G, N, P).
    """

    x_QMG1P: Tensor
    dt_QMG1P: Tensor
    B_QMGN1: Tensor
    C_QMGN1: Tensor
    A_log2e_GNP: Tensor
    reset_QM111: Tensor | None
    has_reset_Q: list[bool]
    num_rows: int

    @staticmethod
    def of(
        block: slice, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Tensor | None
    ) -> "_Steps":
        x_QMG, dt_QMG, B_QMG, C_QMG = (_to_chunks(v[:, block])[..., None] for v in (x, dt, B, C))
        reset_QM111 = None if reset is None else _to_chunks(reset[:, block])[..., None, None, None]
        has_reset_Q = (
            [False] * CHUNK_LEN if reset_QM111 is None else reset_QM111.flatten(1).any(1).tolist()
        )
        # exp2 is four times as fast as exp on CPU
        A_log2e = A * math.log2(math.e)
        return _Steps(
            x_QMG.mT,
            dt_QMG.mT,
            B_QMG,
            C_QMG,
            A_log2e,
            reset_QM111,
            has_reset_Q,
            num_rows=x_QMG.shape[1],
        )

    def decays(self, out: Tensor) -> Iterator[Tensor]:
        """exp(dt_t A), (M, G, N, P), of one step after another into ``out``; 0 where the step
        starts a document.
        """
        for t, (dt_MG1P, decay_MGNP) in enumerate(zip(self.dt_QMG1P, out, strict=True)):
            torch.mul(dt_MG1P, self.A_log2e_GNP, out=decay_MGNP).exp2_()
            if self.reset_QM111 is not None and self.has_reset_Q[t]:
                decay_MGNP.masked_fill_(self.reset_QM111[t], 0)
            yield decay_MGNP

    def chunk_decay(self) -> Tensor:
        """What a chunk leaves of the state at its start: (M, G, N, P)."""
        decay_MGNP = torch.exp2(self.dt_QMG1P.sum(0) * self.A_log2e_GNP)
        return (
            decay_MGNP
            if self.reset_QM111 is None
            else decay_MGNP.masked_fill_(self.reset_QM111.any(0), 0)
        )


def _scan_block(steps: _Steps, state_BGNP: Tensor, decays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y (Q, M, G, P), the states at the chunks' starts (M, G, N, P) and the last one (B,
    G, N, P).
    """
    h_MGNP = state_BGNP.new_zeros(decays.shape[1:])
    for x, B, decay in zip(
        steps.x_QMG1P,
        steps.B_QMGN1,
        steps.decays(out=decays),
        strict=True,
    ):
        h_MGNP.mul_(decay).addcmul_(x, B)
    starts_MGNP, state_BGNP = _carry(h_MGNP, steps.chunk_decay(), state_BGNP)
    h_MGNP.copy_(starts_MGNP)
    y_QMG1P = torch.empty_like(steps.x_QMG1P)
    for x, B, C, decay, y in zip(
        steps.x_QMG1P, steps.B_QMGN1, steps.C_QMGN1, decays, y_QMG1P, strict=True
    ):
        h_MGNP.mul_(decay).addcmul_(x, B)
        _matmul(C.mT, h_MGNP, out=y)
    return y_QMG1P.squeeze(3), starts_MGNP, state_BGNP


def _recompute(steps: _Steps, starts_MGNP: Tensor, decays: Tensor, states: Tensor) -> None:
    """Fill ``decays`` of every step, and ``states`` before every step and after the last."""
    h_MGNP = states[0].copy_(starts_MGNP)
    for x, B, decay, state in zip(
        steps.x_QMG1P, steps.B_QMGN1, steps.decays(out=decays), states[1:], strict=True
    ):
        h_MGNP = torch.mul(h_MGNP, decay, out=state).addcmul_(x, B)


def _gradient_of_ends(
    steps: _Steps, dy_QMG1P: Tensor, decays: Tensor, dstate_BGNP: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the states at the chunks' ends (M, G, N, P), and of the state that entered the
    block.
    """
    g_MGNP = dstate_BGNP.new_zeros(decays.shape[1:])
    for C, dy, decay in _backwards(steps.C_QMGN1, dy_QMG1P, decays):
        g_MGNP.addcmul_(C, dy).mul_(decay)
    return _carry(
        g_MGNP,
        steps.chunk_decay(),
        dstate_BGNP,
        reverse=True,
    )


def _chunk_gradients(
    steps: _Steps, dy_QMG1P: Tensor, A_GNP: Tensor, decays: Tensor, states: Tensor, g_MGNP: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of A (G, N, P), x and dt (Q, M, G, P), B and C (Q, M, G, N), given those of the
    chunks' last states.

    ``g_MGNP`` is used up: the gradient of h_t, then of h_{t-1}, by g_t = decay_{t+1} g_{t+1} + C_t
    dy_t.
    """
    dx_QMG1P = torch.empty_like(dy_QMG1P)
    ddt_QMG1P = torch.empty_like(dy_QMG1P)
    dB_QMG1N = torch.empty_like(steps.B_QMGN1.mT)
    dC_QMG1N = torch.empty_like(steps.C_QMGN1.mT)
    dA_MGNP = torch.zeros_like(g_MGNP)
    dlog_decay = torch.empty_like(g_MGNP)
    given = _backwards(
        steps.x_QMG1P,
        steps.dt_QMG1P,
        steps.B_QMGN1,
        steps.C_QMGN1,
        dy_QMG1P,
        decays,
        states[:-1],
        states[1:],
    )
    wanted = _backwards(dx_QMG1P, ddt_QMG1P, dB_QMG1N, dC_QMG1N)
    for (x, dt, B, C, dy, decay, state_before, state), (dx, ddt, dB, dC) in zip(
        given, wanted, strict=True
    ):
        g_MGNP.addcmul_(C, dy)
        _matmul(B.mT, g_MGNP, out=dx)
        _matmul(x, g_MGNP.mT, out=dB)
        _matmul(dy, state.mT, out=dC)
        g_MGNP.mul_(decay)
        torch.mul(g_MGNP, state_before, out=dlog_decay)
        dA_MGNP.addcmul_(dlog_decay, dt)
        torch.sum(
            dlog_decay.mul_(A_GNP),
            dim=2,
            keepdim=True,
            out=ddt,
        )
    return (
        dA_MGNP.sum(0),
        dx_QMG1P.squeeze(3),
        ddt_QMG1P.squeeze(3),
        dB_QMG1N.squeeze(3),
        dC_QMG1N.squeeze(3),
    )


def _backwards(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Their steps together, the last first."""
    return zip(*(reversed(x.unbind(0)) for x in tensors), strict=True)


def _carry(
    added_MGNP: Tensor, decay_MGNP: Tensor, state_BGNP: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """From chunk to chunk, backwards if ``reverse``: what enters each (M, G, N, P), and what leaves
    the last.
    """
    num_chunks = len(added_MGNP) // max(len(state_BGNP), 1)
    added, decays = (
        v.unflatten(0, (len(state_BGNP), num_chunks)) for v in (added_MGNP, decay_MGNP)
    )
    entering_BCGNP = torch.empty_like(added)
    for c in reversed(range(num_chunks)) if reverse else range(num_chunks):
        entering_BCGNP[:, c] = state_BGNP
        state_BGNP = torch.addcmul(added[:, c], decays[:, c], state_BGNP)
    return entering_BCGNP.flatten(0, 1), state_BGNP


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Products of the last two dims of (M, G, ., .) into ``out`` (contiguous)."""
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))


def _to_chunks(x_BL: Tensor) -> Tensor:
    """(B, L, ...) to (Q, B·C, ...), contiguous; zeros fill the last chunk (with dt = 0 a state
    stays as it is).
    """
    batch, length = x_BL.shape[:2]
    rest = x_BL.shape[2:]
    num_chunks = -(-length // CHUNK_LEN)
    if (missing := num_chunks * CHUNK_LEN - length) > 0:
        x_BL = torch.cat([x_BL, x_BL.new_zeros(batch, missing, *rest)], dim=1)
    x_QBC = x_BL.reshape(batch, num_chunks, CHUNK_LEN, *rest).movedim(2, 0)
    return x_QBC.reshape(CHUNK_LEN, batch * num_chunks, *rest).contiguous()


def _from_chunks(x_QM: Tensor, out: Tensor) -> None:
    """The inverse of ``_to_chunks``, into ``out`` (B, L, ...)."""
    batch, length = out.shape[:2]
    num_whole, rest = divmod(length, CHUNK_LEN)
    x_BCQ = x_QM.unflatten(1, (batch, -(-length // CHUNK_LEN))).movedim(0, 2)
    out[:, : length - rest].unflatten(1, (num_whole, CHUNK_LEN)).copy_(x_BCQ[:, :num_whole])
    if rest:
        out[:, length - rest :].copy_(x_BCQ[:, num_whole, :rest])
