"""The SSD scan in Triton: a sweep over the chunks of a head with its state in registers.

Forward is one kernel. A program owns one head's state (N x a block of P) and walks along the row:
inside a chunk the scan is masked attention, C·Bᵀ is recomputed for each head (a quarter of the
products, where keeping it would cost 41 KB of L2 traffic a token at 80 heads), and nothing of size
(chunks, H, P, N) reaches memory. Where batch x heads are too few programs to fill a card, rows are
cut into segments: a first sweep (x, B and dt only) leaves the state that each segment adds, and the
segments then start from the sum over those before them.

Backward has three kernels: the sweep once more, for the state that enters each chunk (in the dtype
of x); the forward's mirror image, from the last chunk to the first, for dx, with the gradient of
the state in registers, stored for each chunk too; and all chunks in parallel, a program holding the
sums of dB and dC over the heads that share them. dA and ddt_bias leave one partial sum a chunk, dD
one a segment. No atomics: runs repeat bitwise, and as segments and blocks of heads follow from
shapes alone, they do on any card of one architecture.

Legend: B batch, L length, H heads, P head width, N state size, G groups.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import cuda_arch, dense_rows, strides_in_units
from kernels.ssd.triton_kernels import (
    ssd_bwd_dBC_kernel,
    ssd_bwd_dx_kernel,
    ssd_fwd_kernel,
    ssd_states_kernel,
)

PROGRAMS = 512  # that a sweep should have at least: about two an SM of an H200, with some to spare
MIN_SEGMENT = 4  # chunks
HEADS_OF_PROGRAM = 16  # that a program of the backward sums dB and dC over, at most

trial: dict[
    str, Any
] = {}  # launch options that ``kernels.ssd.bench.sweep`` tries in place of the fixed ones


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) in the dtype of x and the last states (B, H, P, N) in fp32.

    A, D (H, P), dt_bias and the initial states are fp32; everything else as ``kernels.ssd.ssd`` has
    it.
    """
    (batch, length, heads, width) = x.shape
    (groups, state_size) = B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((batch, heads, width, state_size), dtype=torch.float32, device=x.device)
    if x.numel() == 0 or state_size == 0:
        return y.zero_(), final.zero_() if initial is None else final.copy_(initial)
    x = dense_rows(x)
    B = dense_rows(B)
    C = dense_rows(C)
    seq_idx = seq_idx if seq_idx is None else seq_idx.contiguous()
    sweep = _Sweep(x, B, chunk_size)
    sums, decays = sweep.segment_sums(
        x,
        dt,
        A,
        B,
        dt_bias,
        seq_idx,
        dt_softplus,
        dt_limit,
    )
    strides, unit = _strides_of(x, dt, B, C)
    ssd_fwd_kernel[sweep.grid](
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        initial,
        seq_idx,
        sums,
        decays,
        y,
        final,
        length,
        heads,
        width,
        state_size,
        heads // groups,
        *sweep.cut,
        *dt_limit,
        *strides,
        *_strides(D),
        SOFTPLUS=dt_softplus,
        UNIT=unit,
        **sweep.options,
    )
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float],
    chunk_size: int,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, and of those of D, dt_bias, initial that there are, in the dtype
    of each.
    """
    (batch, length, heads, width) = x.shape
    (groups, state_size) = B.shape[2:]
    optional = [t for t in (D, dt_bias, initial) if t is not None]
    if x.numel() == 0 or state_size == 0:
        zeros = [
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            for t in (x, dt, A, B, C, *optional)
        ]
        if initial is not None and dfinal is not None:
            zeros[-1] = dfinal.clone()
        return zeros
    x = dense_rows(x)
    B = dense_rows(B)
    C = dense_rows(C)
    dy = dy.contiguous()
    seq_idx = seq_idx if seq_idx is None else seq_idx.contiguous()
    dfinal = dfinal if dfinal is None else dfinal.contiguous()
    sweep = _Sweep(x, B, chunk_size)
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    strides, unit = _strides_of(x, dt, B, C)
    scalars = (seq_idx, dt_softplus, dt_limit)
    sizes = (length, heads, width, state_size, heads // groups)

    entering = sweep.chunk_states(x, dt, A, B, dt_bias, initial, *scalars)
    leaving = sweep.empty_states(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    through_dt, through_into = fp32((2, sweep.blocks_of_width, batch, length, heads))
    dD = None if D is None else fp32((batch, sweep.segments, heads, width))
    dinitial = (
        None
        if initial is None
        else torch.empty_like(initial, memory_format=torch.contiguous_format)
    )
    sums = sweep.segment_sums(
        dy,
        dt,
        A,
        C,
        dt_bias,
        *scalars,
        reverse=True,
    )
    ssd_bwd_dx_kernel[sweep.grid](
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        dfinal,
        seq_idx,
        dy,
        *sums,
        dx,
        through_dt,
        through_into,
        dD,
        leaving,
        dinitial,
        *sizes,
        *sweep.cut,
        *dt_limit,
        *strides,
        *_strides(D),
        SOFTPLUS=dt_softplus,
        UNIT=unit,
        **sweep.options,
    )

    options = _gradient_options(sweep.options)
    options["HEADS"] = min(HEADS_OF_PROGRAM, heads // groups)
    blocks_of_group = triton.cdiv(heads // groups, options["HEADS"])
    parts = (batch, length, groups * blocks_of_group, state_size)
    kind = x.dtype if blocks_of_group == 1 else torch.float32
    dB, dC = (torch.empty(parts, dtype=kind, device=x.device) for _ in range(2))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    dA, dbias = fp32((2, batch, sweep.chunks, heads))
    ssd_bwd_dBC_kernel[(groups * blocks_of_group, sweep.chunks, batch)](
        x,
        dt,
        A,
        B,
        C,
        dt_bias,
        seq_idx,
        dy,
        entering,
        leaving,
        through_dt,
        through_into,
        ddt,
        dA,
        dB,
        dC,
        None if dt_bias is None else dbias,
        *sizes,
        sweep.chunks,
        blocks_of_group,
        sweep.blocks_of_width,
        *dt_limit,
        *strides,
        SOFTPLUS=dt_softplus,
        UNIT=unit,
        **options,
    )
    if blocks_of_group > 1:
        dB, dC = (
            part.unflatten(2, (groups, blocks_of_group)).sum(3).to(x.dtype) for part in (dB, dC)
        )
    rest = (
        dD if dD is None else dD.sum((0, 1)),
        None if dt_bias is None else dbias.sum((0, 1)),
        dinitial,
    )
    return [
        dx,
        ddt,
        dA.sum((0, 1)),
        dB,
        dC,
        *(gradient for gradient in rest if gradient is not None),
    ]


class _Sweep:
    """How the heads of one call are swept: chunks, segments, grid and launch options."""

    def __init__(self, x: Tensor, B: Tensor, chunk_size: int) -> None:
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.state = B.shape[2:]
        self.options = _sweep_options(x, B, chunk_size)
        self.chunks = triton.cdiv(self.length, self.options["CHUNK"])
        self.blocks_of_width = triton.cdiv(self.width, self.options["BLOCK_P"])
        columns = self.heads * self.blocks_of_width
        segments = min(PROGRAMS // max(1, columns * self.batch), self.chunks // MIN_SEGMENT)
        self.chunks_of_segment = triton.cdiv(self.chunks, max(1, segments))
        self.segments = triton.cdiv(self.chunks, self.chunks_of_segment)
        self.grid = (columns, self.segments, self.batch)
        self.cut = (self.chunks, self.chunks_of_segment, self.segments)

    def segment_sums(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        dt_bias: Tensor | None,
        seq_idx: Tensor | None,
        dt_softplus: bool,
        dt_limit: Sequence[float],
        reverse: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What each segment adds to the state (B, segments, H, N, P), and its decay (B, segments,
        H), in fp32.
        """
        if self.segments == 1:
            return None, None
        shape = (self.batch, self.segments, self.heads, self.state, self.width)
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
        decays = torch.empty(shape[:3], dtype=torch.float32, device=x.device)
        self._carry(
            x, dt, A, B, dt_bias, None, seq_idx, sums, decays, None, dt_softplus, dt_limit, reverse
        )
        return sums, decays

    def chunk_states(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        dt_bias: Tensor | None,
        start: Tensor | None,
        seq_idx: Tensor | None,
        dt_softplus: bool,
        dt_limit: Sequence[float],
    ) -> Tensor:
        """The state that enters each chunk: (B, chunks, H, N, P) in the dtype of x."""
        sums = self.segment_sums(
            x,
            dt,
            A,
            B,
            dt_bias,
            seq_idx,
            dt_softplus,
            dt_limit,
        )
        states = self.empty_states(x)
        self._carry(
            x, dt, A, B, dt_bias, start, seq_idx, *sums, states, dt_softplus, dt_limit, False
        )
        return states

    def empty_states(self, x: Tensor) -> Tensor:
        """Memory for one state a chunk."""
        shape = (self.batch, self.chunks, self.heads, self.state, self.width)
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    def _carry(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        dt_bias: Tensor | None,
        start: Tensor | None,
        seq_idx: Tensor | None,
        sums: Tensor | None,
        decays: Tensor | None,
        states: Tensor | None,
        dt_softplus: bool,
        dt_limit: Sequence[float],
        reverse: bool,
    ) -> None:
        strides, unit = _strides_of(x, dt, B)
        ssd_states_kernel[self.grid](
            x,
            dt,
            A,
            B,
            dt_bias,
            start,
            seq_idx,
            sums,
            decays,
            states,
            self.length,
            self.heads,
            self.width,
            self.state,
            self.heads // self.groups,
            *self.cut,
            *dt_limit,
            *strides,
            SOFTPLUS=dt_softplus,
            REVERSE=reverse,
            UNIT=unit,
            **self.options,
        )


def _sweep_options(x: Tensor, B: Tensor, chunk_size: int) -> dict[str, Any]:
    """Tiles by shape class and card, such that registers do not spill (``kernels.compile_all``).

    Hopper's matrix units read from shared memory and want 64 rows; before, operands are in
    registers, and 32 rows fit. fp32 is multiplied as it is (TF32 would keep three digits), by units
    that take all operands from registers.
    """
    exact = x.element_size() == 4
    large = B.shape[-1] > 128
    hopper = cuda_arch() >= 90 and not (exact or large)
    return {
        "CHUNK": _chunk(chunk_size, 16 if exact else 64 if hopper else 32),
        "BLOCK_P": min(max(16, triton.next_power_of_2(x.shape[-1])), 16 if exact or large else 32),
        "BLOCK_N": max(16, triton.next_power_of_2(B.shape[-1])),
        "PRECISION": "ieee",
        "num_warps": 8 if exact or large or hopper else 4,
        "num_stages": 1 if exact or large else 2,
        **trial,
    }


def _gradient_options(of_sweep: dict[str, Any]) -> dict[str, Any]:
    """Of the chunk-parallel kernel, where two (chunk x N) sums stay in registers; the chunk is the
    sweeps'.
    """
    return {
        **of_sweep,
        "BLOCK_P": of_sweep["BLOCK_P"] if cuda_arch() >= 90 else 16,
        "num_warps": 8,
        "num_stages": 1,
    }


def _chunk(asked: int, most: int) -> int:
    """The power of two nearest below what was asked for, of those that the tensor cores and
    registers allow.
    """
    return max(16, min(most, 1 << (max(1, asked).bit_length() - 1)))


def _strides_of(x: Tensor, dt: Tensor, *others: Tensor) -> tuple[tuple[int, ...], int]:
    """Strides of x, dt and the others, in the order in which kernels take them; those of dt in
    values.
    """
    strides, unit = strides_in_units(x, *others)
    return (*strides[:3], *dt.stride(), *strides[3:]), unit


def _strides(D: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if D is None else D.stride()
