"""rms_norm and the gated norm beside PyTorch's operations: ``python -m kernels.rms_norm.bench``.

``sweep`` tries launch options on a card. On a GPU both are bound by bytes. Plain, a residual stream in fp32 to bf16, a
token and channel: forward 4 + 2, backward reads 4 + 2 and writes 4. Gated, all bf16: forward reads 4 and writes 2,
backward reads 6 and writes 4. Compiled for sm_90, forward takes 56 to 80 registers a thread for its 32 values (24 warps
an SM and more), backward 69 to 164 for 16 (12 and more); no spills.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import SIZES, Case, Op, Size, leaves, sweep_constants
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


def gpu_cases() -> Iterator[Case]:
    """The residual stream's norm and Mamba-2's gated norm."""
    for size in SIZES:
        tokens, D = size.batch * size.length, size.d_model
        yield Case(
            op="rms_norm",
            shapes=f"{size.name}: {tokens} x {D}, float32 to bfloat16",
            make=partial(_stream, D),
            full=tokens,
            tiny=64,
            ours=to_bf16,
            exact=peer,
            bytes_moved=(6 * tokens * D, 16 * tokens * D),
            flops=(4 * tokens * D, 14 * tokens * D),
            peers={"liger-kernel": _liger},
        )
        D, group = size.heads * size.head_dim, size.heads * size.head_dim // size.groups
        yield Case(
            op="gated_rms_norm",
            shapes=f"{size.name}: {tokens} x {D} in groups of {group}",
            make=partial(_pair, size),
            full=tokens,
            tiny=64,
            ours=partial(gated_rms_norm, eps=EPS, group_size=group),
            exact=partial(gated_rms_norm, eps=EPS, group_size=group, backend="torch"),
            bytes_moved=(6 * tokens * D, 16 * tokens * D),
            flops=(9 * tokens * D, 30 * tokens * D),
            peers={"mamba_ssm": partial(_mamba_ssm, group)},
        )


def _liger() -> Op:
    """Liger's, whose output has the dtype of its input."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False).bfloat16()


def _mamba_ssm(group: int) -> Op:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return lambda x, z, weight: rmsnorm_fn(x, weight, None, z, EPS, group, norm_before_gate=False)


def _stream(D: int, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return leaves(torch.randn(tokens, D), torch.ones(D), dtype=torch.float32, device=device)


def _pair(size: Size, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    D = size.heads * size.head_dim
    wide = torch.randn(tokens, 2 * D + 2 * size.groups * size.state + size.heads, device=device)
    x, z = torch.randn(tokens, D, device=device).to(dtype), wide.to(dtype)[:, :D]  # z is a view of the projection
    weight = torch.ones(D, device=device)
    return [t.detach().requires_grad_() for t in (x, z, weight)]


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.rms_norm import triton

    sweep_constants(triton, gpu_cases(), TILE=(2048, 4096, 8192), GRADIENT_PROGRAMS=(512, 1024, 2048))


def main() -> None:
    """Print the table."""
    if sys.argv[1:] == ["sweep"]:
        return sweep()
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
