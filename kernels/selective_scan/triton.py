"""The selective scan in two kernels: a program owns some channels of a row, walks over blocks of
tokens, loops over N.

A block is 32 R tokens, R = 8. A thread holds R successive tokens of a channel, a "lane": so the
scan over a block is R steps in registers, a scan over the 32 lanes of a warp by shuffles, and R
steps again from each lane's exact start. The running state goes from block to block through memory,
as ``states``, which is all that backward needs beside the inputs. Every exponent is delta·A, taken
once in forward and once in backward, as exp2 of delta·(A log2 e) in fp32; nothing is divided by a
decay, and a decay that underflows is just zero.

Bytes a token, D channels in bf16 with z, N states: forward reads u, delta, z and writes y, 8 D, and
writes the states that enter blocks, D N / 64 (D / 4 at N = 16). Backward reads u, delta, z, dy and
writes du, ddelta, dz, 14 D, and writes and reads parts of dB and dC, 16 N for each program along D.
B and C are first copied to fp32 in the order in which lanes read them, 16 N bytes a token in all:
each program reads them once for all its channels. Softplus, bias, skip and gate add no pass; what
the gate multiplies is recomputed in backward.

Bound by instructions, not bytes: D·N elements a token (41 k at D 2560, N 16) take 12 instructions
each forward, 33 backward (``bench.py``); one of them is the exp2. Parallel are rows and blocks of
channels, and tokens within a block: a warp works on two channels whatever N is, so forward has rows
· D / 16 programs of 8 warps, backward up to rows · D / 8 of 4. Two forward on each of 132 SMs take
rows · D = 4,224, one 2,112; under that SMs are idle. The sequence is not cut into segments of
several programs all the same: that would take every exponent twice.

Deterministic from run to run and on any card: no atomics. Gradients of B and C are summed over the
channels of a program in registers and shared memory, in one order, then over programs by ``sum``;
those of A, D and the bias over tokens by their program, then over rows by ``sum``. The number of
programs depends on shapes only.

Legend: B rows, L length, D channels, N states, G groups of B and C, P = D / G, K blocks of 32 R
    tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.selective_scan.triton_kernels import (
    selective_scan_bwd_kernel,
    selective_scan_fwd_kernel,
)

FORWARD: dict[str, Any] = {
    "CHANNELS": 16,
    "num_warps": 8,
    "maxnreg": 128,
}  # 128: two programs an SM, where ptxas would take 170
BACKWARD: dict[str, Any] = {"CHANNELS": 8, "num_warps": 4, "maxnreg": None}
# of backward, where there are that many: 2 an SM run at once, and the last round should be full
MIN_PROGRAMS = 512


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lane_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), the last state (B, D, N), and the states before blocks and after the last (B, K
    + 1, D, N).

    B and C are (B, G, N, L).
    """
    rows, channels, length = u.shape
    groups, num_states = B.shape[1:3]
    D, bias = (x if x is None else x.contiguous() for x in (D, bias))
    width = channels // groups
    blocks = triton.cdiv(length, 32 * lane_tokens)
    y = torch.empty((rows, length, channels), dtype=u.dtype, device=u.device)
    states = torch.empty(
        (rows, blocks + 1, channels, num_states), dtype=torch.float32, device=u.device
    )
    states[:, 0] = 0 if initial_state is None else initial_state
    if y.numel():
        selective_scan_fwd_kernel[(triton.cdiv(width, FORWARD["CHANNELS"]), groups, rows)](
            u,
            delta,
            _decays(A),
            _by_lane(B, lane_tokens),
            _by_lane(C, lane_tokens),
            D,
            z,
            bias,
            seq_idx,
            y,
            states,
            length,
            channels,
            width,
            num_states,
            blocks,
            *_strides(u, delta, z),
            *_strides(seq_idx, dims=2),
            **_flags(D, z, bias, seq_idx, delta_softplus),
            R=lane_tokens,
            **FORWARD,
        )
    return y, states[:, blocks].clone(), states


def backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    states: Tensor,
    lane_tokens: int,
) -> list[Tensor]:
    """Gradients of u, delta (B, L, D), A (D, N), B, C (B, G, N, L), the initial state (B, D, N),
    and D, z and the bias.

    Of the last three those that there are; all but those of u, delta and z are fp32. dy is (B, L,
    D), dlast (B, D, N).
    """
    rows, channels, length = u.shape
    groups, num_states = B.shape[1:3]
    D, bias = (x if x is None else x.contiguous() for x in (D, bias))
    width = channels // groups
    blocks = states.shape[1] - 1
    slices = _slices(rows * groups, width)
    parts = triton.cdiv(width, BACKWARD["CHANNELS"] * slices)
    du, ddelta, dz = (
        None if x is None else torch.empty((rows, length, channels), dtype=x.dtype, device=u.device)
        for x in (u, delta, z)
    )
    dA = u.new_zeros((rows, channels, num_states), dtype=torch.float32)
    dD, dbias = (u.new_zeros((rows, channels), dtype=torch.float32) for _ in range(2))
    dBC = torch.empty(
        (parts, rows, groups, num_states, blocks, 32, 2, lane_tokens),
        dtype=torch.float32,
        device=u.device,
    )
    dstate = u.new_zeros((2, rows, channels, num_states), dtype=torch.float32)
    if dlast is not None:
        dstate[blocks % 2] = dlast
    if u.numel():
        selective_scan_bwd_kernel[(parts, groups, rows)](
            u,
            delta,
            _decays(A),
            _by_lane(B, lane_tokens),
            _by_lane(C, lane_tokens),
            D,
            z,
            bias,
            seq_idx,
            states,
            dy,
            du,
            ddelta,
            dz,
            dA,
            dBC,
            dD,
            dbias,
            dstate,
            length,
            channels,
            width,
            num_states,
            blocks,
            *_strides(u, delta, z),
            *_strides(seq_idx, dims=2),
            *dy.mT.stride(),
            **_flags(D, z, bias, seq_idx, delta_softplus),
            SLICES=slices,
            WARPS=BACKWARD["num_warps"],
            R=lane_tokens,
            **BACKWARD,
        )
    dB, dC = (x.sum(0).flatten(3)[..., :length].contiguous() for x in dBC.unbind(-2))
    optional = [None if D is None else dD.sum(0), dz, None if bias is None else dbias.sum(0)]
    return [dx for dx in (du, ddelta, dA.sum(0), dB, dC, dstate[0], *optional) if dx is not None]


def _slices(rows: int, width: int) -> int:
    """Times BACKWARD's channels that a program has: more make fewer parts of dB and dC, and fewer
    programs.
    """
    programs = rows * triton.cdiv(width, BACKWARD["CHANNELS"])
    return next((n for n in (8, 4, 2) if programs >= n * MIN_PROGRAMS), 1)


def _decays(A: Tensor) -> Tensor:
    """A log2(e) in fp32, for exponentials of base 2."""
    return (A.float() * math.log2(math.e)).contiguous()


def _by_lane(x: Tensor, lane_tokens: int) -> Tensor:
    """(B, G, N, L) as fp32 (B, G, N, K, R, 32), where token (k, r, lane) is 32 R k + R lane + r;
    zeros at the end.
    """
    block = 32 * lane_tokens
    x = F.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, 32, lane_tokens))
    return x.transpose(-1, -2).contiguous()


def _flags(
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, seq_idx: Tensor | None, softplus: bool
) -> dict[str, bool]:
    given = {"HAS_D": D, "HAS_Z": z, "HAS_BIAS": bias, "HAS_SEQ": seq_idx}
    return {**{name: x is not None for name, x in given.items()}, "SOFTPLUS": softplus}


def _strides(*tensors: Tensor | None, dims: int = 3) -> list[int]:
    return [stride for x in tensors for stride in ([0] * dims if x is None else x.stride())]
