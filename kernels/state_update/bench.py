"""One Mamba-2 decoding step, forward only, beside transformers' torch path.

``python -m kernels.state_update.bench``.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.state_update.op import state_update
from kernels.timing import Row, machine, print_rows, relative_error, times_in_turn

BATCH, HEADS, WIDTH, STATE, GROUPS = 8, 64, 64, 128, 1
ROUNDS, LIMIT = 31, 1e-5


def make_inputs() -> dict[str, Tensor]:
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


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
