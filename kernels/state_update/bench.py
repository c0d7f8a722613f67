"""One Mamba-2 decoding step beside transformers' torch path: python -m kernels.state_update.bench."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.state_update.op import state_update

BATCH, HEADS, WIDTH, STATE, GROUPS = 8, 64, 64, 128, 1
ROUNDS = 31


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


def peer_step(state: Tensor, x: Tensor, **rest: Tensor | bool) -> Tensor:
    """The step of transformers' Mamba2Mixer as it runs without mamba_ssm."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    return mamba2_selective_state_update(state, x, **rest)


def main() -> None:
    """Check a step, then print milliseconds of both and the paired ratio; no speed where the results differ."""
    inputs = make_inputs()
    states = {
        fn: torch.randn(BATCH, HEADS, WIDTH, STATE, generator=torch.Generator().manual_seed(1)) for fn in _CANDIDATES
    }
    ours, peer = (fn(states[fn], **inputs, dt_softplus=True) for fn in _CANDIDATES)
    if (error := float((ours - peer).norm() / peer.norm())) > 1e-5:
        print(f"relative error {error:.1e} > 1e-05: no timing")
        return
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for fn, taken in zip(_CANDIDATES, times, strict=True):
            start = time.perf_counter()
            fn(states[fn], **inputs, dt_softplus=True)
            taken.append(1e3 * (time.perf_counter() - start))
    ratio = statistics.median(p / o for o, p in zip(*times, strict=True))
    print(f"state_update B{BATCH} H{HEADS} P{WIDTH} N{STATE} fp32, {torch.get_num_threads()} threads,", end=" ")
    print(f"torch {torch.__version__}, median of {ROUNDS}, ms")
    print(f"ours {statistics.median(times[0]):.2f}  transformers {statistics.median(times[1]):.2f}  ratio {ratio:.2f}")


_CANDIDATES: tuple[Callable[..., Tensor], Callable[..., Tensor]] = (state_update, peer_step)

if __name__ == "__main__":
    main()
