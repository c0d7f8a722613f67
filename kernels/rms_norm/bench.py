"""rms_norm and the gated norm beside PyTorch's operations.

``python -m kernels.rms_norm.bench`` tries launch options on a card. On a GPU both are bound by
bytes. Plain, a residual stream in fp32 to bf16, a token and channel: forward 4 + 2, backward reads
4 + 2 and writes 4. Gated, all bf16: forward reads 4 and writes 2, backward reads 6 and writes 4.
Compiled for sm_90, forward takes 56 to 80 registers a thread for its 32 values (24 warps an SM and
more), backward 69 to 164 for 16 (12 and more); no spills.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import Case, Op, Size, in_fp32, leaves, of_sizes, sweep_constants
from kernels.rms_norm.op import gated_rms_norm, rms_norm
from kernels.rms_norm.reference import gated_rms_norm_reference, rms_norm_reference

EPS = 1e-5


def pytorchs(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the stream, rounded to the dtype of the matrices that follow."""
    return F.rms_norm(x, weight.shape, weight, EPS).to(dtype)


def plain(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula in plain operations."""
    return rms_norm_reference(x, weight, EPS).to(dtype)


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """The residual stream's norm and Mamba-2's gated norm."""
    tokens = size.tokens
    D = size.d_model
    w = dtype.itemsize
    yield Case(
        op="rms_norm",
        shapes=f"{size.name}: {tokens} x {D}, float32 to {str(dtype)[6:]}",
        make=partial(_stream, D),
        full=tokens,
        tiny=64,
        ours=partial(rms_norm, eps=EPS, out_dtype=dtype),
        exact=partial(pytorchs, dtype=dtype),
        reference=partial(plain, dtype=dtype),
        bytes_moved=((4 + w) * tokens * D, (12 + 2 * w) * tokens * D),
        flops=(4 * tokens * D, 14 * tokens * D),
        peers={"liger-kernel": partial(_liger, dtype)},
        cpu_peers={"F.rms_norm": lambda: partial(pytorchs, dtype=dtype)},
        dtype=dtype,
    )
    D = size.heads * size.head_dim
    group = size.heads * size.head_dim // size.groups
    yield Case(
        op="gated_rms_norm",
        shapes=f"{size.name}: {tokens} x {D} in groups of {group}",
        make=partial(_pair, size),
        full=tokens,
        tiny=64,
        ours=partial(gated_rms_norm, eps=EPS, group_size=group),
        exact=partial(
            gated_rms_norm,
            eps=EPS,
            group_size=group,
            backend="torch",
        ),
        reference=in_fp32(partial(gated_rms_norm_reference, eps=EPS, group_size=group)),
        bytes_moved=(3 * w * tokens * D, 8 * w * tokens * D),
        flops=(9 * tokens * D, 30 * tokens * D),
        peers={"mamba_ssm": partial(_mamba_ssm, group)},
        dtype=dtype,
    )


def _liger(dtype: torch.dtype) -> Op:
    """Liger's, whose output has the dtype of its input."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(
        x,
        weight,
        EPS,
        0.0,
        "llama",
        False,
    ).to(dtype)


def _mamba_ssm(group: int) -> Op:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return lambda x, z, weight: rmsnorm_fn(
        x,
        weight,
        None,
        z,
        EPS,
        group,
        norm_before_gate=False,
    )


def _stream(D: int, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return leaves(
        torch.randn(tokens, D),
        torch.ones(D),
        dtype=torch.float32,
        device=device,
    )


def _pair(size: Size, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    D = size.heads * size.head_dim
    wide = torch.randn(tokens, 2 * D + 2 * size.groups * size.state + size.heads, device=device)
    # z is a view of the projection
    x = torch.randn(tokens, D, device=device).to(dtype)
    z = wide.to(dtype)[:, :D]
    weight = torch.ones(D, device=device)
    return [t.detach().requires_grad_() for t in (x, z, weight)]


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.rms_norm import triton

    sweep_constants(
        triton, of_sizes(cases), TILE=(2048, 4096, 8192), GRADIENT_PROGRAMS=(512, 1024, 2048)
    )


if __name__ == "__main__":
    sweep()
