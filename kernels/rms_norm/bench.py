"""rms_norm and the gated norm beside PyTorch's operations: ``python -m kernels.rms_norm.bench``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm.op import gated_rms_norm, rms_norm
from kernels.timing import Row, compare, machine, print_rows

TOKENS, EPS = 2048, 1e-5


def to_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """The residual stream's norm, in the dtype of the matrices that follow."""
    return rms_norm(x, weight, EPS, torch.bfloat16)


def peer(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's."""
    return F.rms_norm(x, weight.shape, weight, EPS).bfloat16()


def gated(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Mamba-2's."""
    return gated_rms_norm(x, z, weight, EPS)


def gated_peer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """As the Mamba-2 blocks of transformers write it."""
    u = x.float() * F.silu(z.float())
    return weight * (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def measure() -> list[Row]:
    """A residual stream in fp32 normed to bf16, and the gated norm in bf16."""
    rows = []
    for D in (256, 1024):
        inputs = [torch.randn(TOKENS, D).requires_grad_(), torch.ones(D, requires_grad=True)]
        case = f"{TOKENS} x {D}, float32 to bfloat16"
        rows += compare("rms_norm", case, to_bf16, {"F.rms_norm": peer}, inputs, limit=2e-2)
    pair = [torch.randn(TOKENS, 512).bfloat16().requires_grad_() for _ in "xz"]
    inputs = [*pair, torch.ones(512, requires_grad=True)]
    peers = {"transformers' formula": gated_peer}
    rows += compare("gated_rms_norm", f"{TOKENS} x 512, bfloat16", gated, peers, inputs, limit=2e-2)
    return rows


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
