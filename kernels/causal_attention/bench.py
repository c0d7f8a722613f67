"""Causal attention beside PyTorch's fused attention: ``python -m kernels.causal_attention.bench``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_attention.op import causal_attention
from kernels.timing import Row, compare, machine, print_rows

B, L, H, G, P = 4, 512, 4, 2, 64


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's, with its causal flag."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def measure() -> list[Row]:
    """bf16 and fp32, one document a row."""
    rows = []
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        shapes = (B, L, H, P), (B, L, G, P), (B, L, G, P)
        inputs = [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]
        case, dy = f"B{B} L{L} H{H} of {G} P{P}, {str(dtype)[6:]}", torch.randn(B, L, H, P).to(dtype)
        peers = {"scaled_dot_product_attention": fused}
        rows += compare("causal_attention", case, causal_attention, peers, inputs, limit=limit, dy=dy)
    return rows


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
