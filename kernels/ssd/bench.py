"""The SSD scan beside transformers' torch path, mamba_ssm and fla: ``python -m kernels.ssd.bench``
sweeps on a card.

On a GPU, per token, with 16-bit inputs, P = 64, N = 128, chunks of Q = 64:
- forward moves x, y, B, C and dt once: 4HP + 4GN + 2H bytes, 12.4 KB at moe-3b's 40 heads and 4
  groups (2.6 us a thousand tokens at 4.8 TB/s), where five kernels move about 2.5 times that
  (states and C·Bᵀ in fp32). Its products are 2QN + 2QP + 4NP a head, 57 KFLOP, or 74 with two
  blocks of P that each repeat C·Bᵀ.
- backward reads x three times and dy twice, writes dx once, and writes and reads two states a chunk
  in 16 bits: 12HP + 8HPN/Q = 28HP bytes, 72 KB at 40 heads.
- the compiler's report on sm_90 (``make compile-kernels``): the sweeps take 71 to 254 registers at
  8 warps without spills and up to 84 KiB of shared memory, so an SM holds one block of most, and
  loads are fetched a chunk ahead (2 stages); the chunk-parallel kernel takes 255 and spills 8 bytes
  a thread. Packed rows take 80 to 255 and spill 88 forward and 48 in the chunk-parallel kernel.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend
from kernels.cases import Case, Size, documents, leaves, of_sizes
from kernels.ssd.op import ssd

CHUNK = 64
PEER_DEFAULT_CHUNK = (
    256  # chunk size in transformers' configurations of Mamba-2 and GraniteMoeHybrid
)


def ours(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """No initial and no final states."""
    y = ssd(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=CHUNK,
        D=D,
        dt_bias=dt_bias,
        seq_idx=seq_idx,
        dt_softplus=True,
        backend=backend,
    )
    assert isinstance(y, Tensor)
    return y


def peer(chunk: int) -> Callable[..., Tensor]:
    """The scan of transformers' Mamba2Mixer and GraniteMoeHybrid as it runs without mamba_ssm."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
    ) -> Tensor:
        y = mamba2_chunk_scan(
            x, dt, A, B, C, chunk_size=chunk, D=D, dt_bias=dt_bias, dt_softplus=True
        )
        return y.to(x.dtype)

    return scan


def plain(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The dual form, masked attention over whole rows (arXiv 2405.21060, section 3.2), in fp32.

    The recurrence of ``reference.py`` is no peer: its backward pass is quadratic too, a slice's
    gradient after another.
    """
    steps = F.softplus(dt.float() + dt_bias)
    length = x.shape[1]
    per_group = x.shape[2] // B.shape[2]
    total_BHL = (steps * A).double().cumsum(1).mT  # fp32 would lose the differences
    visible_BLL = torch.ones(
        length,
        length,
        dtype=torch.bool,
        device=x.device,
    ).tril()[None]
    if seq_idx is not None:
        visible_BLL = visible_BLL & (seq_idx[:, :, None] == seq_idx[:, None])
    log_decay = (total_BHL[..., None] - total_BHL[:, :, None]).masked_fill(
        ~visible_BLL[:, None], -torch.inf
    )
    scores = torch.einsum("blgn,bsgn->bgls", C.float(), B.float()).repeat_interleave(per_group, 1)
    y = torch.einsum(
        "bhls,bshp->blhp", scores * log_decay.float().exp(), steps[..., None] * x.float()
    )
    return (y + D[:, None] * x.float()).to(x.dtype)


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """The scan of a Mamba-2 layer, plain and packed."""
    for packing in (False, True):
        H = size.heads
        P = size.head_dim
        N = size.state
        G = size.groups
        tokens = size.tokens
        w = dtype.itemsize
        # bytes a token: x, B, C, dt; y
        inputs = w * (H * P + 2 * G * N + H)
        outputs = w * H * P
        # Of a head and token: C·Bᵀ, half of W·x, C·h, B·xᵀ.
        products = 2 * CHUNK * N + CHUNK * P + 4 * N * P
        yield Case(
            op="ssd",
            shapes=f"{size.name}: B{size.batch} L{size.length} H{H} P{P} N{N} "
            f"G{G}{', packed' if packing else ''}",
            make=partial(_layer, size, packing),
            full=tokens,
            tiny=70,
            ours=ours,
            exact=partial(ours, backend="torch"),
            reference=plain,
            bytes_moved=(tokens * (inputs + outputs), tokens * (3 * inputs + 2 * outputs)),
            flops=(tokens * H * products, tokens * H * (3 * products + 2 * N * P)),
            peers={"mamba_ssm": _mamba_ssm} if packing else {"mamba_ssm": _mamba_ssm, "fla": _fla},
            cpu_peers={}
            if packing
            else {
                f"transformers, chunk {chunk}": partial(peer, chunk)
                for chunk in (CHUNK, PEER_DEFAULT_CHUNK)
            },
            dtype=dtype,
            loose=0.0 if dtype is torch.float32 else 3e-2,
        )


def _layer(size: Size, packing: bool, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    batch, length = size.rows(tokens)
    # Views of the convolution's output.
    widths = (
        size.heads * size.head_dim,
        *[size.groups * size.state] * 2,
    )
    x, B, C = torch.randn(batch, length, sum(widths), device=device).to(dtype).split(widths, -1)
    x = x.unflatten(-1, (size.heads, -1))
    (B, C) = (t.unflatten(-1, (size.groups, -1)) for t in (B, C))
    dt = torch.randn(batch, length, size.heads, device=device).to(dtype)
    x, dt, B, C = (t.detach().requires_grad_() for t in (x, dt, B, C))
    A = -torch.linspace(1, 16, size.heads)
    D = torch.ones(size.heads)
    bias = torch.linspace(-6.9, -2.3, size.heads)
    A, D, bias = leaves(A, D, bias, dtype=torch.float32, device=device)
    inputs = [x, dt, A, B, C, D, bias]
    return [*inputs, documents(batch, length, device)] if packing else inputs


def _mamba_ssm() -> Callable[..., Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        return mamba_chunk_scan_combined(
            x,
            dt,
            A,
            B,
            C,
            PEER_DEFAULT_CHUNK,
            D=D,
            dt_bias=dt_bias,
            seq_idx=seq_idx,
            dt_softplus=True,
        )

    return scan


def _fla() -> Callable[..., Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
    ) -> Tensor:
        step = F.softplus(dt.float() + dt_bias)
        heads = x.shape[2] // B.shape[2]
        k, q = ((t.repeat_interleave(heads, 2)) for t in (B, C))
        v = (x * step[..., None]).to(x.dtype)
        y, _ = chunk_simple_gla(q, k, v, g=step * A, scale=1.0)
        return y + (x * D[:, None]).to(x.dtype)

    return scan


def sweep() -> None:
    """Time launch options on this card, forward and forward with backward, best first."""
    from triton.testing import do_bench

    from kernels.ssd import triton

    for case in of_sizes(cases):
        inputs = case.make(case.full, case.dtype, "cuda")
        taken = []
        for chunk, block, warps, stages in itertools.product((32, 64), (32, 64), (4, 8), (1, 2, 3)):
            triton.trial.update(
                CHUNK=chunk,
                BLOCK_P=block,
                num_warps=warps,
                num_stages=stages,
            )
            try:
                both = [
                    do_bench(partial(run, ours, inputs))
                    for run in (case.forward, case.forward_backward)
                ]
            except Exception as error:  # too much shared memory, say: the next one may fit
                print(f"{triton.trial}: {type(error).__name__}")
                continue
            taken.append((*both, dict(triton.trial)))
        triton.trial.clear()
        print(
            case.shapes,
            *(
                f"{a:.3f} {b:.3f} ms {options}"
                for a, b, options in sorted(taken, key=lambda row: row[1])
            ),
            sep="\n",
        )


if __name__ == "__main__":
    sweep()
