"""linear_cross_entropy forward and backward against F.cross_entropy(F.linear) in bf16: time, after a check."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.bench import forward_backward, median_ms, relative_error
from kernels.linear_cross_entropy.op import linear_cross_entropy


def main() -> None:
    """Print the times, or the difference when the two disagree."""
    T, V, D = 2048, 8192, 256
    inputs = [torch.randn(T, D).bfloat16().requires_grad_(), (0.05 * torch.randn(V, D)).bfloat16().requires_grad_()]
    targets_T, dloss = torch.randint(V, (T,)), torch.tensor(1 / T)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets_T)

    def peer(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets_T, reduction="sum")

    print(f"linear_cross_entropy forward + backward, {T} x {V}, D {D}, bf16, {torch.get_num_threads()} threads")
    error = relative_error(forward_backward(ours, inputs, dloss), forward_backward(peer, inputs, dloss))
    if not error < 2e-2:
        print(f"differs from the peer by {error:.1e}, limit 2e-2; no speed")
        return
    own, other = median_ms([ours, peer], inputs, dloss)
    print(f"{own:.1f} ms, cross_entropy(linear) {other:.1f} ms: {other / own:.1f}x")


if __name__ == "__main__":
    main()
