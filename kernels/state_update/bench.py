"""Decoding steps, forward only: ``python -m kernels.state_update.bench``, Mamba-2 beside transformers' torch path.

On a GPU (``gpu_cases``) bound by bytes: the state is read and written once, 8 bytes for each of its elements; all else
is 1 / P or 1 / N of that. The compiler's report for sm_90 (``make compile-kernels``), on Mamba-2's layers: 64
registers, no spills, so an SM holds 32 warps with four 16-byte loads of the state under way a thread, 64 KiB. A program
takes 464 instructions a warp for its 2,048 elements: an SM issues them in 464 clocks, and moves their bytes in 800 (4.8
TB/s over 132 SMs at 1.8 GHz). At batch 1 a state is 0.5 to 2 MB, which an H200 moves in less than 1 microsecond.
``sweep`` tries launch options on a card.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import SIZES, Case, Size, sweep_constants
from kernels.state_update.op import state_update
from kernels.timing import Row, machine, print_rows, relative_error, times_in_turn

BATCH, HEADS, WIDTH, STATE, GROUPS = 8, 64, 64, 128, 1
ROUNDS, LIMIT = 31, 1e-5
GPU_BATCHES = (1, 32, 256)


def make_inputs() -> dict[str, Any]:
    """Random fp32 inputs; A, dt, D and dt_bias expanded from one number a head, as decoding code passes them."""
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    return {
        "x": normal(BATCH, HEADS, WIDTH),
        "dt": normal(BATCH, HEADS)[..., None].expand(-1, -1, WIDTH),
        "A": -torch.linspace(1, 16, HEADS)[:, None, None].expand(-1, WIDTH, STATE),
        "B": normal(BATCH, GROUPS, STATE),
        "C": normal(BATCH, GROUPS, STATE),
        "D": torch.ones(HEADS)[:, None].expand(-1, WIDTH),
        "dt_bias": torch.full((HEADS,), -4.0)[:, None].expand(-1, WIDTH),
    }


def measure() -> list[Row]:
    """Steps from the same state, each candidate advancing its own."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    inputs = make_inputs()
    x, state = inputs.pop("x"), torch.randn(BATCH, HEADS, WIDTH, STATE, generator=torch.Generator().manual_seed(1))
    steps = [
        partial(fn, state.clone(), x, **inputs, dt_softplus=True)
        for fn in (state_update, mamba2_selective_state_update)
    ]
    ours, peer = (step() for step in steps)
    ours_ms, peer_ms = times_in_turn(steps, ROUNDS)
    return [
        Row(
            op="state_update",
            case=f"one step, B{BATCH} H{HEADS} P{WIDTH} N{STATE}, float32",
            peer="transformers",
            error=relative_error([ours], [peer]),
            limit=LIMIT,
            ours_ms=ours_ms,
            peer_ms=peer_ms,
        )
    ]


def step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, **options: Any
) -> Tensor:
    """Mamba-2's, without a gate."""
    return state_update(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, **options)


def gpu_cases() -> Iterator[Case]:
    """The Mamba-2 layer of each size, decoding for one request and for many."""
    for size in SIZES:
        H, P, N, G = size.heads, size.head_dim, size.state, size.groups
        for batch in GPU_BATCHES:
            yield Case(
                op="state_update",
                shapes=f"{size.name}: B{batch} H{H} P{P} N{N} G{G}",
                make=partial(_stationary, size),
                full=batch,
                tiny=1,
                ours=step,
                exact=partial(step, backend="torch"),
                bytes_moved=(batch * (8 * H * P * N + 4 * H * P + 2 * H + 4 * G * N),) * 2,
                flops=(6 * batch * H * P * N,) * 2,
                peers={"mamba_ssm": _mamba_ssm},
            )


def _stationary(size: Size, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs and the state that a step with them leaves as it is: so candidates may step it in turn, any number."""
    H, P, N, G = size.heads, size.head_dim, size.state, size.groups
    x, dt = torch.randn(batch, H, P), torch.randn(batch, H)
    B, C = torch.randn(2, batch, G, N)
    x, dt, B, C = (t.to(device, dtype) for t in (x, dt, B, C))
    A, D, bias = -torch.linspace(1, 16, H), torch.ones(H), torch.linspace(-6.9, -2.3, H)
    A, D, bias = (t.to(device) for t in (A, D, bias))
    steps = F.softplus(dt.float() + bias)[..., None, None]
    B_BHN = B.float().repeat_interleave(H // G, 1)
    state = steps * x.float()[..., None] * B_BHN[:, :, None] / -torch.expm1(steps * A[:, None, None])
    return [state, x, dt, A, B, C, D, bias]


def _mamba_ssm() -> Callable[..., Tensor]:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def peer(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
    ) -> Tensor:
        per_head = x.shape[1:]
        dt, A = dt[..., None].expand(x.shape), A[:, None, None].expand(state.shape[1:])
        D, dt_bias = (t[:, None].expand(per_head) for t in (D, dt_bias))
        return selective_state_update(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)

    return peer


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.state_update import triton

    sweep_constants(triton, gpu_cases(), TILE=(1024, 2048, 4096))


def main() -> None:
    """Print the table."""
    if sys.argv[1:] == ["sweep"]:
        return sweep()
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
