"""The chunked, head-fused SSD scan with a hand-written backward: matrix products in the dtype of x,
scalars in fp32.

Inside a chunk the scan is masked linear attention; between chunks a state is carried (Mamba-2,
arXiv 2405.21060, section 6 and Listing 1). What makes it fast where elementwise passes and page
faults cost more than products:
- heads of a group share one product with B and with C;
- the causal mask is laid on C·Bᵀ, which has no head dim, so the (chunk x chunk) decay of each head
  is only subtracted, clamped at zero, exponentiated (base 2: four times as fast on CPU) and
  multiplied;
- chunks are handled in blocks whose temporaries stay in cache and are allocated from the same
  memory again and again;
- backward recomputes decays and weights; beside the inputs it keeps C·Bᵀ, the state that enters
  each chunk and its product with C, in the dtype of x: recomputing those too costs 13 % of forward
  and backward in fp32 (AVX-512, 1 core);
- what is one scalar a token and head (step sizes, decays) is left to autograd.
These are plain tensor operations: CUDA tensors run them as well, in one block.

Shape suffixes: B batch, L length, C chunks, T tiles (chunks of all rows, B·C), Q chunk length, G
groups, J heads of a group (H = G·J heads), P head width, N state size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.compiled import piece
from kernels.ssd.reference import step_size

# Of a temporary: 512 KiB in fp32; two of them fit in the L2 cache of one core.
_BLOCK_ELEMENTS = 1 << 17
_BY_HEAD = (0, 2, 3, 1, 4)  # T Q G J P -> T G J Q P
_FROM_HEAD = (0, 3, 1, 2, 4)
_BY_GROUP = (0, 2, 1, 3, 4)  # T Q G J P <-> T G Q J P


@piece
def _decay_and_weights(cum_TGJQ: Tensor, scores_TGQQ: Tensor) -> tuple[Tensor, Tensor]:
    """The decay from token j to i in fp32, and the attention-like weights decay · C_i·B_j in the
    dtype of scores.
    """
    decay = (cum_TGJQ[..., :, None] - cum_TGJQ[..., None, :]).clamp_(max=0).exp2_()
    return decay, (decay * scores_TGQQ.to(decay.dtype)[:, :, None]).to(scores_TGQQ.dtype)


@piece
def _decay_and_score_grads(
    dweights: Tensor, decay: Tensor, scores_TGQQ: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the cumulative log2-decay (T, G, J, Q) and of the scores, not yet masked.

    The diagonal cannot reach the log-decay; leaving it out keeps the row and column sums from
    cancelling badly.
    """
    dscores_TGJQQ = dweights.to(decay.dtype) * decay
    through_decay = dscores_TGJQQ * scores_TGQQ.to(decay.dtype).tril(-1)[:, :, None]
    dcum_TGJQ = (through_decay.sum(-1) - through_decay.sum(-2)) * math.log(2)
    return dcum_TGJQ, dscores_TGJQQ.sum(2)


@piece
def _combine(
    y_diag_TGJQP: Tensor, y_off_TGQJP: Tensor, out_decay_TQGJ: Tensor, x: Tensor, D: Tensor | None
) -> Tensor:
    """y (T, Q, G, J, P) from its part inside the chunk, its part from the carried state,
    and D x.
    """
    y_TQGJP = y_off_TGQJP.to(out_decay_TQGJ.dtype).permute(_BY_GROUP) * out_decay_TQGJ[..., None]
    y_TQGJP += y_diag_TGJQP.permute(_FROM_HEAD)
    if D is not None:
        y_TQGJP += x.to(D.dtype) * D
    return y_TQGJP.to(x.dtype)


@piece
def _input_grads(
    dx_dt_TGJQP: Tensor,
    dx_in_TGQJP: Tensor,
    x: Tensor,
    dy: Tensor,
    dt: Tensor,
    in_scale: Tensor,
    D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, dt, in_scale and D; the first two arguments are those of x·dt and of
    x·in_scale.
    """
    real = dt.dtype
    x_real = x.to(real)
    dx_dt = dx_dt_TGJQP.to(real).permute(_FROM_HEAD)
    dx_in = dx_in_TGQJP.to(real).permute(_BY_GROUP)
    ddt = torch.linalg.vecdot(dx_dt, x_real)
    din_scale = torch.linalg.vecdot(dx_in, x_real)
    dx = (dx_dt * dt[..., None]).addcmul_(dx_in, in_scale[..., None])
    if D is None:
        return dx.to(x.dtype), ddt, din_scale, None
    dy_real = dy.to(real)
    return dx.addcmul_(dy_real, D).to(x.dtype), ddt, din_scale, (dy_real * x_real).sum((0, 1))


def _scaled(x_TQGJP: Tensor, scale_TQGJ: Tensor, order: tuple[int, ...]) -> Tensor:
    """x times one scalar a token and head, written contiguously with its dims permuted by
    ``order``.
    """
    x = x_TQGJP.permute(order)
    scale = scale_TQGJ[..., None].to(x_TQGJP.dtype).permute(order)
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _masked_scores(B_TGQN: Tensor, C_TGQN: Tensor, visible: Tensor) -> Tensor:
    """C_i·B_j, zero where token i does not see token j: a product with 0 and 1 is vectorised,
    ``masked_fill`` not.
    """
    return (C_TGQN @ B_TGQN.mT).mul_(visible)


def _blocks(x_TQGJP: Tensor) -> list[slice]:
    """Slices of tiles: as many as keep a block's largest temporary in cache; all of them on an
    accelerator.
    """
    tiles, chunk, groups, heads, width = x_TQGJP.shape
    size = max(1, _BLOCK_ELEMENTS // (groups * heads * chunk * max(chunk, width)))
    size = size if x_TQGJP.device.type == "cpu" else tiles
    return [slice(start, min(start + size, tiles)) for start in range(0, max(tiles, 1), size)]


def _outer_sums(x: Tensor, scale: Tensor, B_TGQN: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_j scale_j B_j x_jᵀ over each chunk: (T, G, N, J·P)."""
    tiles, _, groups, *heads = x.shape
    shape = (tiles, groups, B_TGQN.shape[-1], heads[0] * heads[1])
    sums = torch.empty(shape, dtype=dtype, device=x.device)
    for block in _blocks(x):
        factors = B_TGQN[block].mT, _scaled(x[block], scale[block], _BY_GROUP).flatten(-2)
        if dtype == x.dtype:
            torch.matmul(*factors, out=sums[block])
        else:
            sums[block] = torch.matmul(*factors)
    return sums


def _carry_(
    updates: Tensor, decay_BCGJ: Tensor, first_BGNJP: Tensor, reverse: bool = False
) -> Tensor:
    """Run s <- decay_c s + updates_c over the chunks of each row, replacing updates_c by the s that
    it meets.

    Returns the s after the last chunk.
    """
    by_row = updates.view(*decay_BCGJ.shape[:2], *first_BGNJP.shape[1:])
    decay = decay_BCGJ[:, :, :, None, :, None]
    order = range(by_row.shape[1])
    state = first_BGNJP
    for c in reversed(order) if reverse else order:
        after = torch.addcmul(by_row[:, c], state, decay[:, c])
        by_row[:, c] = state
        state = after
    return state


class _ChunkedScan(torch.autograd.Function):
    """y (T, Q, G, J, P) and the final state (B, G, N, J, P) from tiles and per-token scalars."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt: Tensor,
        cum: Tensor,
        in_scale: Tensor,
        out_decay: Tensor,
        chunk_decay: Tensor,
        initial: Tensor,
        visible: Tensor,
    ) -> tuple[Tensor, Tensor]:
        B_TGQN = B.transpose(1, 2)
        C_TGQN = C.transpose(1, 2)
        cum_TGJQ = cum.permute(0, 2, 3, 1).contiguous()
        states = _outer_sums(x, in_scale, B_TGQN, initial.dtype)
        final = _carry_(states, chunk_decay, initial)
        entering = states.to(x.dtype)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y_off = torch.empty((*C_TGQN.shape[:3], entering.shape[-1]), dtype=x.dtype, device=x.device)
        scores = _masked_scores(B_TGQN, C_TGQN, visible)
        for t in _blocks(x):
            _, weights = _decay_and_weights(cum_TGJQ[t], scores[t])
            y_diag = weights @ _scaled(x[t], dt[t], _BY_HEAD)
            torch.matmul(C_TGQN[t], entering[t], out=y_off[t])
            y[t] = _combine(
                y_diag,
                y_off[t].unflatten(-1, x.shape[-2:]),
                out_decay[t],
                x[t],
                D,
            )
        ctx.save_for_backward(
            x, B, C, D, dt, cum, in_scale, out_decay, chunk_decay, visible, scores, entering, y_off
        )
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, B, C, D, dt, cum, in_scale, out_decay, chunk_decay, visible, scores, entering, y_off = (
            ctx.saved_tensors
        )
        B_TGQN = B.transpose(1, 2)
        C_TGQN = C.transpose(1, 2)
        leaving = _outer_sums(dy, out_decay, C_TGQN, dfinal.dtype)
        dinitial = _carry_(leaving, chunk_decay, dfinal, reverse=True)
        cum_TGJQ = cum.permute(0, 2, 3, 1).contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles = (
            x,
            B_TGQN,
            C_TGQN,
            dy,
            dt,
            cum_TGJQ,
            in_scale,
            out_decay,
            visible,
            scores,
            entering,
            leaving,
            y_off,
        )
        small: list[list[Tensor]] = []
        for t in _blocks(x):
            dx[t], *rest = _tile_grads(D, *(tensor[t] for tensor in tiles))
            small.append(rest)
        *grads, dDs = zip(*small, strict=True)
        dB, dC, ddt, dcum, din_scale, dout_decay, dchunk_decay = (
            torch.cat(parts) for parts in grads
        )
        dD = None if D is None else torch.stack(dDs).sum(0)
        dchunk_decay = dchunk_decay.view(chunk_decay.shape)
        return dx, dB, dC, dD, ddt, dcum, din_scale, dout_decay, dchunk_decay, dinitial, None


def _tile_grads(
    D: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dy: Tensor,
    dt: Tensor,
    cum_TGJQ: Tensor,
    in_scale: Tensor,
    out_decay: Tensor,
    visible: Tensor,
    scores: Tensor,
    entering: Tensor,
    leaving: Tensor,
    y_off: Tensor,
) -> tuple[Any, ...]:
    """Gradients of x, B, C, dt, cum, in_scale, out_decay, chunk_decay and D for a block of tiles.

    ``leaving`` (T, G, N, J·P) is the gradient of the state after each chunk, ``entering`` the state
    before it, in the dtype of x, ``y_off`` (T, G, Q, J·P) the products of C with that state,
    ``scores`` (T, G, Q, Q) those of C with B.
    """
    heads = x.shape[-2:]
    mm = x.dtype
    decay, weights = _decay_and_weights(cum_TGJQ, scores)
    dy_TGJQP = dy.permute(_BY_HEAD).contiguous()
    dweights = dy_TGJQP @ _scaled(x, dt, _BY_HEAD).mT
    dcum, dscores = _decay_and_score_grads(dweights, decay, scores)
    dscores = dscores.mul_(visible).to(mm)

    leaving_mm = leaving.to(mm)
    x_in = _scaled(x, in_scale, _BY_GROUP).flatten(-2)
    dy_out = _scaled(dy, out_decay, _BY_GROUP).flatten(-2)
    dout_decay = torch.linalg.vecdot(
        dy.to(dt.dtype), y_off.to(dt.dtype).unflatten(-1, heads).permute(_BY_GROUP)
    )
    dchunk_decay = (leaving * entering.to(dt.dtype)).unflatten(-1, heads).sum((2, 4))  # (T, G, J)

    dx_in = (B @ leaving_mm).unflatten(-1, heads)
    dx, ddt, din_scale, dD = _input_grads(
        weights.mT @ dy_TGJQP,
        dx_in,
        x,
        dy,
        dt,
        in_scale,
        D,
    )
    dB = dscores.mT @ C + x_in @ leaving_mm.mT
    dC = dscores @ B + dy_out @ entering.mT
    dcum = dcum.permute(0, 3, 1, 2)
    return (
        dx,
        dB.transpose(1, 2),
        dC.transpose(1, 2),
        ddt,
        dcum,
        din_scale,
        dout_decay,
        dchunk_decay,
        dD,
    )


def _tile(t: Tensor, chunks: int, chunk: int) -> Tensor:
    """(B, L, ...) -> (T, Q, ...), the ragged end of each row filled with zeros: tokens whose step
    size is 0.
    """
    missing = chunks * chunk - t.shape[1]
    if missing:
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing))
    return t.unflatten(1, (chunks, chunk)).flatten(0, 1)


def _visibility(seq_idx: Tensor | None, chunks: int, chunk: int, x: Tensor) -> tuple[Tensor, ...]:
    """Which of two tokens of a chunk see each other, and which tokens the carried state reaches or
    takes in.

    Returns visible (T, 1, Q, Q), 0 or 1 in the dtype of x, and bool enters (T, Q), leaves (T, Q),
    crosses (T); without seq_idx each has one tile, and the last three one token.
    """
    length = x.shape[1]
    past = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril_()
    if seq_idx is None or length == 0:
        always = torch.ones(1, 1, dtype=torch.bool, device=x.device)
        return past[None, None].to(x.dtype), always, always, always[0]
    tail = seq_idx[:, -1:].expand(-1, chunks * chunk - length)
    seq_BCQ = torch.cat([seq_idx, tail], dim=1).unflatten(1, (chunks, chunk))
    last = seq_BCQ[..., -1:]
    # The initial state belongs to the first sequence.
    before = torch.cat([seq_BCQ[:, :1, :1], last[:, :-1]], dim=1)
    visible = past & (seq_BCQ[..., :, None] == seq_BCQ[..., None, :])
    enters = seq_BCQ == before
    leaves = seq_BCQ == last
    crosses = last[..., 0] == before[..., 0]
    return (
        visible.flatten(0, 1)[:, None].to(x.dtype),
        enters.flatten(0, 1),
        leaves.flatten(0, 1),
        crosses.flatten(),
    )


def _decays(
    dt_TQH: Tensor, A: Tensor, visible: Tensor, enters: Tensor, leaves: Tensor, crosses: Tensor
) -> tuple[Tensor, ...]:
    """Cumulative log2-decay, what scales x into the state, and the decay of the carried state at a
    token and a chunk.

    The cumulative sums start anew with each document and are products with the mask: nothing of a
    document, not even rounding, reaches the gradient of another.
    """
    cum_TQH = visible.squeeze(1).to(dt_TQH.dtype) @ (dt_TQH * (A * math.log2(math.e)))
    total = cum_TQH[:, -1:]
    in_scale = dt_TQH * (total - cum_TQH).clamp(max=0).exp2() * leaves[..., None]
    out_decay = cum_TQH.clamp(max=0).exp2() * enters[..., None]
    return cum_TQH, in_scale, out_decay, total[:, 0].clamp(max=0).exp2() * crosses[..., None]


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) in the dtype of x, and the final states (B, H, P, N) in fp32 (fp64 for fp64
    inputs).

    Arguments as ``kernels.ssd.ssd``, already checked.
    """
    (batch, length, heads, width) = x.shape
    (groups, state_size) = B.shape[2:]
    chunk = max(1, min(chunk_size, length))
    chunks = max(1, -(-length // chunk))
    by_group = (groups, heads // groups)
    real = torch.promote_types(x.dtype, torch.float32)
    dt_TQH = _tile(step_size(dt, dt_bias, dt_softplus, dt_limit).to(real), chunks, chunk)
    visible, *masks = _visibility(seq_idx, chunks, chunk, x)
    scalars = [
        t.unflatten(-1, by_group) for t in (dt_TQH, *_decays(dt_TQH, A.to(real), visible, *masks))
    ]
    scalars[-1] = scalars[-1].unflatten(0, (batch, chunks))
    if D is not None:
        D = (D if D.ndim == 2 else D[:, None].expand(-1, width)).to(real).unflatten(0, by_group)
    if initial_states is None:
        initial = torch.zeros(
            batch, groups, state_size, by_group[1], width, dtype=real, device=x.device
        )
    else:
        initial = (
            initial_states.to(real)
            .unflatten(1, by_group)
            .permute(
                0,
                1,
                4,
                2,
                3,
            )
        )
    x, B, C = (_tile(t, chunks, chunk) for t in (x, B, C))
    visible = visible.expand(len(x), -1, -1, -1)
    y, final = _ChunkedScan.apply(
        x.unflatten(2, by_group),
        B,
        C,
        D,
        *scalars,
        initial,
        visible,
    )
    y = y.view(batch, chunks * chunk, heads, width)[:, :length]
    return y if z is None else y * F.silu(z.to(y.dtype)), final.permute(0, 1, 3, 4, 2).flatten(1, 2)
