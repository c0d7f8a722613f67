"""The gate, forward and backward, beside its plain reference: ``python -m kernels.engram_gate.bench``."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.engram_gate import engram_gate
from kernels.engram_gate.reference import engram_gate_reference

EPS = 1e-5


def _inputs(streams: int, width: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """h, k, v and the norms' weights; keys lean towards h, or away from it, because the slope has a pole at score 0."""
    h_BLSD = torch.randn(1, tokens, streams, width)
    k_BLSD = torch.randn_like(h_BLSD) + h_BLSD * (torch.randint(0, 2, (1, tokens, streams, 1)) * 2 - 1)
    inputs = [x.to(dtype) for x in (h_BLSD, k_BLSD, torch.randn(1, tokens, width))]
    inputs += [torch.rand(streams, width) + 0.5 for _ in range(2)]
    return [x.requires_grad_() for x in inputs]


def _gradients(gate: Callable[..., Any], inputs: list[Tensor], du: Tensor) -> tuple[Tensor, ...]:
    u = gate(*inputs, EPS)
    return u.detach(), *torch.autograd.grad(u, inputs, du)


def _plain(*args: Any) -> Tensor:
    return engram_gate_reference(*args)[0]


def _error(streams: int, width: int, dtype: torch.dtype) -> float:
    """Largest relative RMSE of output and gradients against the reference in fp64."""
    inputs = _inputs(streams, width, 100, dtype)
    du = torch.randn(1, 100, streams, width, dtype=dtype)
    exact = _gradients(_plain, [x.detach().double().requires_grad_() for x in inputs], du.double())
    got = _gradients(engram_gate, inputs, du)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True))


def _milliseconds(gate: Callable[..., Any], inputs: list[Tensor], du: Tensor) -> float:
    start = time.perf_counter()
    _gradients(gate, inputs, du)
    return 1e3 * (time.perf_counter() - start)


def main(tokens: int = 2048, width: int = 256, repeats: int = 9) -> None:
    """Print the medians of alternating runs and the median of their ratios."""
    print(f"{tokens} tokens, D={width}, forward+backward, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for streams in (1, 4):
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            error = _error(streams, width, dtype)
            if not error < limit:
                raise SystemExit(f"S={streams} {dtype}: relative RMSE {error:.1e} > {limit}; no speed is printed")
            inputs = _inputs(streams, width, tokens, dtype)
            du = torch.randn(1, tokens, streams, width, dtype=dtype)
            _milliseconds(engram_gate, inputs, du)
            pairs = torch.tensor(
                [[_milliseconds(f, inputs, du) for f in (_plain, engram_gate)] for _ in range(repeats)]
            )
            plain, ours = pairs.median(0).values.tolist()
            ratio = float((pairs[:, 0] / pairs[:, 1]).median())
            print(
                f"S={streams} {dtype!s:15} plain {plain:7.2f} ms  ours {ours:7.2f} ms  {ratio:4.1f}x  error {error:.0e}"
            )


if __name__ == "__main__":
    main()
