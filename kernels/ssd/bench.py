"""Forward plus backward of ``ssd`` beside transformers' chunked torch path: python -m kernels.ssd.bench."""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.compiled import compile_pieces
from kernels.ssd.op import ssd

BATCH, LENGTH, HEADS, WIDTH, STATE, GROUPS, CHUNK = 4, 512, 8, 64, 64, 1, 64
PEER_DEFAULT_CHUNK = 256  # chunk size in transformers' configurations of both models
ROUNDS = 15


def make_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs at the scale of a freshly initialised Mamba-2 layer, all requiring gradient."""
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(dtype).requires_grad_()

    return {
        "x": normal(BATCH, LENGTH, HEADS, WIDTH),
        "dt": normal(BATCH, LENGTH, HEADS),
        "B": normal(BATCH, LENGTH, GROUPS, STATE),
        "C": normal(BATCH, LENGTH, GROUPS, STATE),
        "A": (-torch.linspace(1, 16, HEADS)).requires_grad_(),
        "D": torch.ones(HEADS, requires_grad=True),
        "dt_bias": torch.linspace(-6.9, -2.3, HEADS).requires_grad_(),
    }


def peer_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = CHUNK, **rest: Tensor) -> Tensor:
    """The scan of transformers' Mamba2Mixer and GraniteMoeHybrid as it runs without mamba_ssm."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk, **rest, dt_softplus=True).to(x.dtype)


def our_ssd(**inputs: Tensor) -> Tensor:
    """Ours with the same arguments."""
    y = ssd(**inputs, chunk_size=CHUNK, dt_softplus=True)  # type: ignore[arg-type]
    assert isinstance(y, Tensor)
    return y


def run_step(fn: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """Output and gradients of one forward and backward."""
    y = fn(**inputs)
    return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), dy)]


def largest_difference(inputs: dict[str, Tensor], dy: Tensor) -> float:
    """Largest relative RMSE between ours and the peer's fp32 run, over the output and all gradients."""
    exact = {k: v.detach().float().requires_grad_() for k, v in inputs.items()}
    pairs = zip(run_step(our_ssd, inputs, dy), run_step(peer_ssd, exact, dy.float()), strict=True)
    return max(float((got.float() - want).norm() / want.norm()) for got, want in pairs)


def paired_times(inputs: dict[str, Tensor], dy: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of ours, of the peer at our chunk size and of the peer at its own, taken in turn."""
    candidates: tuple[Callable[..., Tensor], ...] = (
        our_ssd,
        peer_ssd,
        functools.partial(peer_ssd, chunk=PEER_DEFAULT_CHUNK),
    )
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(ROUNDS):
        for fn, taken in zip(candidates, times, strict=True):
            start = time.perf_counter()
            run_step(fn, inputs, dy)
            taken.append(1e3 * (time.perf_counter() - start))
    return times


def report(name: str, dtype: torch.dtype, limit: float) -> None:
    """Print one line; no speed when the results differ by more than ``limit``."""
    inputs = make_inputs(dtype)
    dy = torch.randn_like(inputs["x"])
    if (error := largest_difference(inputs, dy)) > limit:
        print(f"{name} relative error {error:.1e} > {limit:.0e}: no timing")
        return
    ours, *peers = paired_times(inputs, dy)
    print(f"{name} ours {statistics.median(ours):6.1f}", end="")
    for chunk, peer in zip((CHUNK, PEER_DEFAULT_CHUNK), peers, strict=True):
        ratio = statistics.median(p / o for o, p in zip(ours, peer, strict=True))
        print(f"   transformers chunk {chunk} {statistics.median(peer):6.1f} ratio {ratio:4.2f}", end="")
    print(f"   (relative error {error:.0e})")


def main() -> None:
    """One line a dtype, eager and with compiled pieces: median milliseconds and medians of the paired ratios."""
    print(f"ssd forward+backward, B{BATCH} L{LENGTH} H{HEADS} P{WIDTH} N{STATE} G{GROUPS} chunk {CHUNK},", end=" ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {ROUNDS}, ms")
    for compiled in (False, True):
        compile_pieces(compiled)
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            report(f"{'compiled' if compiled else 'eager':8} {str(dtype).removeprefix('torch.'):8}", dtype, limit)
    compile_pieces(False)


if __name__ == "__main__":
    main()
