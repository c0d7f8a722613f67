"""rms_norm forward and backward against torch.nn.functional.rms_norm: time, after a check."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.bench import forward_backward, median_ms, relative_error
from kernels.rms_norm.op import rms_norm


def main() -> None:
    """Print one row a case; a case that disagrees with the peer shows the difference instead of a speed."""
    print(f"rms_norm forward + backward, 2048 tokens, output in bf16, {torch.get_num_threads()} threads")
    for D in (256, 1024):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [torch.randn(2048, D).to(dtype).requires_grad_(), torch.randn(D).to(dtype).requires_grad_()]
            dy = torch.randn(2048, D).bfloat16()

            def ours(x: Tensor, weight: Tensor) -> Tensor:
                return rms_norm(x, weight, 1e-5, torch.bfloat16)

            def peer(x: Tensor, weight: Tensor) -> Tensor:
                return F.rms_norm(x, weight.shape, weight, 1e-5).bfloat16()

            error = relative_error(forward_backward(ours, inputs, dy), forward_backward(peer, inputs, dy))
            if not error < 2e-2:
                print(f"D {D}, {dtype}: differs from the peer by {error:.1e}, limit 2e-2; no speed")
                continue
            own, other = median_ms([ours, peer], inputs, dy)
            print(f"D {D}, {dtype}: {own:.2f} ms, F.rms_norm {other:.2f} ms: {other / own:.1f}x")


if __name__ == "__main__":
    main()
