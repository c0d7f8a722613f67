"""causal_conv1d with SiLU, forward and backward, against nn.functional.conv1d with groups: time and a check first."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.op import causal_conv1d

ROUNDS = 15


def peer(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    """PyTorch's grouped convolution, channels second, as the Mamba blocks of transformers use it."""
    K = weight_DK.shape[1]
    y_BDL = F.conv1d(x_BLD.transpose(1, 2), weight_DK[:, None], bias_D, padding=K - 1, groups=len(weight_DK))
    return F.silu(y_BDL[..., : x_BLD.shape[1]].transpose(1, 2))


def forward_backward(fn: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of all inputs."""
    y = fn(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy))


def relative_error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest relative RMSE of the pairs."""
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(got, expected, strict=True))


def median_ms(fns: list[Callable[..., Tensor]], inputs: list[Tensor], dy: Tensor) -> list[float]:
    """Median time of forward and backward of each function, called in turn."""
    times: list[list[float]] = [[] for _ in fns]
    for _ in range(ROUNDS):
        for fn, spent in zip(fns, times, strict=True):
            start = time.perf_counter()
            forward_backward(fn, inputs, dy)
            spent.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(spent) for spent in times]


def main() -> None:
    """Print one row a case; a case that disagrees with the peer shows the difference instead of a speed."""
    B, L, D, K = 4, 512, 640, 4
    seq_idx_BL = (torch.arange(L) // 100).int().expand(B, L)
    print(f"causal_conv1d forward + backward, {B} x {L} x {D}, {K} taps, SiLU, {torch.get_num_threads()} threads")
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        wide = torch.randn(B, L, 2 * D, dtype=dtype)
        inputs = [t.requires_grad_() for t in (wide[..., D:], torch.randn(D, K).to(dtype), torch.randn(D).to(dtype))]
        dy_BLD = torch.randn(B, L, D, dtype=dtype)

        def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv1d(x, weight, bias, activation="silu")

        def packed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv1d(x, weight, bias, seq_idx_BL, activation="silu")

        error = relative_error(forward_backward(ours, inputs, dy_BLD), forward_backward(peer, inputs, dy_BLD))
        if not error < limit:
            print(f"{dtype}: differs from the peer by {error:.1e}, limit {limit:.0e}; no speed")
            continue
        own, documents, other = median_ms([ours, packed, peer], inputs, dy_BLD)
        print(f"{dtype}: {own:.2f} ms, with documents {documents:.2f} ms, conv1d {other:.2f} ms: {other / own:.1f}x")


if __name__ == "__main__":
    main()
