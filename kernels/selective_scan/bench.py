"""A Mamba-1 layer's scan beside mambapy's and mamba_ssm's:
``python -m kernels.selective_scan.bench`` sweeps on a card.

All candidates take channels-last inputs, with D, softplus and gate.

On a GPU all of it is bound by instructions rather than bytes. The compiler's
report for sm_90 (``make compile-kernels``) and its instructions, in bf16 with z, at 16 elements
(token, channel, state) a thread and turn of the innermost loop:

- forward: 128 registers at 8 warps, two programs an SM; 196 instructions, of which 102 multiply and
  add, 18 exp2, 20 shuffles, 20 loads of B and C. An SM issues 4 a clock: 12 an element are 3.1
  clocks for 32, where its 16 exp2 units take 2.2, and the bytes, 8 for the 16 elements of a token
  and channel at N = 16, take 0.6 at 4.8 TB/s.
- backward: 254 registers at 4 warps, two programs an SM; 526 instructions, 320 of them multiply and
  add, 50 shuffles, 8 barriers: 33 an element. Three programs an SM would need 168 registers and
  spill 240 bytes, 50 of these moves in the innermost loop: ``sweep`` has that too. Parts of dB and
  dC add 2 x 128 / 16 bytes a token and channel to the floor's 14, at the 16 channels a program that
  the shapes below get.

Packed rows (seq_idx) cost forward one multiplication an element, backward none that shows. Widths
that are no multiple of 16 lose 16-byte loads and spill outside the innermost loop.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import Case, Op, Size, documents, in_fp32, leaves, of_sizes
from kernels.selective_scan.op import selective_scan

# as Mamba-1 is published
EXPAND = 2
STATES = 16


def plain(
    u_BLD: Tensor,
    dt_BLD: Tensor,
    A: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D: Tensor,
    z_BLD: Tensor,
    bias: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Step by step as ``reference.py``, but cut once: a slice at every step makes backward
    quadratic in the length.
    """
    dt_BLD1 = F.softplus(dt_BLD + bias).unsqueeze(-1)
    decays = torch.exp(dt_BLD1 * A)
    inputs = dt_BLD1 * B_BLN.unsqueeze(2) * u_BLD.unsqueeze(-1)
    if seq_idx is not None:
        decays = decays * (seq_idx.diff(dim=1, prepend=seq_idx[:, :1]) == 0)[..., None, None]
    h = torch.zeros_like(inputs[:, 0])
    states = []
    for decay, x in zip(decays.unbind(1), inputs.unbind(1), strict=True):
        h = decay * h + x
        states.append(h)
    y_BLD = (torch.stack(states, 1) @ C_BLN.unsqueeze(-1)).squeeze(3)
    return (y_BLD + D * u_BLD) * F.silu(z_BLD)


def _mambapy() -> Op:
    """Its parallel scan, on decays and inputs of all states materialised, (B, L, D, N)."""
    from mambapy.pscan import pscan

    def run(
        u_BLD: Tensor,
        dt_BLD: Tensor,
        A: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        D: Tensor,
        z_BLD: Tensor,
        bias: Tensor,
    ) -> Tensor:
        dt_BLD1 = F.softplus(dt_BLD + bias).unsqueeze(-1)
        h_BLDN = pscan(torch.exp(dt_BLD1 * A), dt_BLD1 * B_BLN.unsqueeze(2) * u_BLD.unsqueeze(-1))
        return ((h_BLDN @ C_BLN.unsqueeze(-1).to(h_BLDN)).squeeze(3) + D * u_BLD) * F.silu(z_BLD)

    return run


def of_layer(
    u_BLD: Tensor,
    dt_BLD: Tensor,
    A: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D: Tensor,
    z_BLD: Tensor,
    bias: Tensor,
    *seq_idx: Tensor,
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]] = selective_scan,
) -> Tensor:
    """As a Mamba-1 layer calls it, on views of channels-last tensors: (B, L, D)."""
    u, dt, B, C, z = (x.transpose(1, 2) for x in (u_BLD, dt_BLD, B_BLN, C_BLN, z_BLD))
    packed = {"seq_idx": seq_idx[0]} if seq_idx else {}
    y = scan(
        u,
        dt,
        A,
        B,
        C,
        D,
        z,
        bias,
        delta_softplus=True,
        **packed,
    )
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """The scan of a Mamba-1 layer of the model's width, plain and packed."""
    for packing in (False, True):
        D = EXPAND * size.d_model
        N = STATES
        tokens = size.tokens
        w = dtype.itemsize
        yield Case(
            op="selective_scan",
            shapes=f"{size.name}: B{size.batch} L{size.length} D{D} "
            f"N{N}{', packed' if packing else ''}",
            make=partial(_layer, size, packing),
            full=tokens,
            tiny=130,
            ours=of_layer,
            exact=partial(of_layer, scan=partial(selective_scan, backend="torch")),
            reference=in_fp32(plain),
            bytes_moved=(w * tokens * (4 * D + 2 * N), w * tokens * (11 * D + 6 * N)),
            flops=(7 * tokens * D * N, 26 * tokens * D * N),
            peers={} if packing else {"mamba_ssm": _mamba_ssm},
            cpu_peers={} if packing else {"mambapy pscan": _mambapy},
            dtype=dtype,
        )


def _layer(size: Size, packing: bool, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    batch, length = size.rows(tokens)
    # of a part of a row: more compile alike
    D = EXPAND * size.d_model if length == size.length else 64
    N = STATES
    u, dt, B, C, z = leaves(
        *(torch.randn(batch, length, width) for width in (D, D, N, N, D)),
        dtype=dtype,
        device=device,
    )
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    skip = torch.ones(D)
    bias = torch.linspace(-6.9, -2.3, D)
    A, skip, bias = leaves(A, skip, bias, dtype=torch.float32, device=device)
    inputs = [u, dt, A, B, C, skip, z, bias]
    return [*inputs, documents(batch, length, device)] if packing else inputs


def _mamba_ssm() -> Callable[..., Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return partial(of_layer, scan=selective_scan_fn)


def sweep() -> None:
    """Time launch options of both kernels on this card, each size's best first."""
    from triton.testing import do_bench

    from kernels.selective_scan import op, triton

    fixed = dict(triton.FORWARD)
    fixed_backward = dict(triton.BACKWARD)
    fixed_programs = triton.MIN_PROGRAMS
    forward = [(16, 8, 128), (16, 8, None), (8, 4, 128), (8, 4, 168), (32, 16, 128)]
    backward = [(8, 4, None), (8, 4, 168), (8, 4, 128), (16, 8, None), (4, 4, 128)]
    for case in of_sizes(cases):
        inputs = case.make(case.full, case.dtype, "cuda")
        taken: list[tuple[float, str, int, tuple[int | None, ...]]] = []
        for lane_tokens, options in itertools.product((4, 8), forward):
            op.LANE_TOKENS = lane_tokens
            triton.FORWARD.update(zip(("CHANNELS", "num_warps", "maxnreg"), options, strict=True))
            taken.append(
                (
                    do_bench(partial(case.forward, case.ours, inputs)),
                    "forward",
                    lane_tokens,
                    options,
                )
            )
        triton.FORWARD.update(fixed)
        for lane_tokens, options, programs in itertools.product((4, 8), backward, (256, 512, 1024)):
            op.LANE_TOKENS = lane_tokens
            triton.MIN_PROGRAMS = programs
            triton.BACKWARD.update(zip(("CHANNELS", "num_warps", "maxnreg"), options, strict=True))
            run = partial(case.forward_backward, case.ours, inputs)
            taken.append((do_bench(run), "forward+backward", lane_tokens, (*options, programs)))
        triton.BACKWARD.update(fixed_backward)
        op.LANE_TOKENS = 8
        triton.MIN_PROGRAMS = fixed_programs
        print(
            case.shapes,
            *(f"{ms:.3f} ms {rest}" for ms, *rest in sorted(taken, key=lambda row: row[0])),
            sep="\n",
        )


if __name__ == "__main__":
    sweep()
