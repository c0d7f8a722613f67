"""Speed of the selective scan: ``python -m kernels.selective_scan.bench``; ``sweep`` tries launch options on a card.

On a CPU beside mambapy's parallel scan and two loops over time; all candidates take the same channels-last inputs, with
D, softplus and gate; each round runs all, one after another.

On a GPU (``gpu_cases``) a Mamba-1 layer's scan, all of which is bound by instructions rather than bytes. The compiler's
report for sm_90 (``make compile-kernels``) and its instructions, in bf16 with z, at 16 elements (token, channel, state)
a thread and turn of the innermost loop:

- forward: 128 registers at 8 warps, two programs an SM; 196 instructions, of which 102 multiply and add, 18 exp2, 20
  shuffles, 20 loads of B and C. An SM issues 4 a clock: 12 an element are 3.1 clocks for 32, where its 16 exp2 units
  take 2.2, and the bytes, 8 for the 16 elements of a token and channel at N = 16, take 0.6 at 4.8 TB/s.
- backward: 254 registers at 4 warps, two programs an SM; 526 instructions, 320 of them multiply and add, 50 shuffles, 8
  barriers: 33 an element. Three programs an SM would need 168 registers and spill 240 bytes, 50 of these moves in the
  innermost loop: ``sweep`` has that too. Parts of dB and dC add 2 x 128 / 16 bytes a token and channel to the floor's
  14, at the 16 channels a program that the shapes below get.

Packed rows (seq_idx) cost forward one multiplication an element, backward none that shows. Widths that are no multiple
of 16 lose 16-byte loads and spill outside the innermost loop.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import SIZES, Case, Size, documents, leaves
from kernels.selective_scan.op import selective_scan
from kernels.selective_scan.reference import selective_scan_reference
from kernels.timing import Row, compare, gradients, machine, print_rows, relative_error

BATCH, LENGTH, CHANNELS, STATES = 2, 1024, 512, 16
ROUNDS = 5
EXPAND, GPU_STATES = 2, 16  # as Mamba-1 is published


def scan_ours(u_BLD: Tensor, raw_dt_BLD: Tensor, A: Tensor, B_BLN: Tensor, C_BLN: Tensor, D: Tensor, z_BLD: Tensor):
    u, raw_dt, B, C, z = (x.transpose(1, 2) for x in (u_BLD, raw_dt_BLD, B_BLN, C_BLN, z_BLD))
    y = selective_scan(u, raw_dt, A, B, C, D, z, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def _with_scan(scan: Callable[[Tensor, Tensor], Tensor]):
    """A peer's way: decays and inputs of all states materialised, (B, L, D, N), then ``scan(decays, inputs)``."""

    def run(u_BLD, raw_dt_BLD, A, B_BLN, C_BLN, D, z_BLD):
        dt_BLD1 = F.softplus(raw_dt_BLD).unsqueeze(-1)
        h_BLDN = scan(torch.exp(dt_BLD1 * A), dt_BLD1 * B_BLN.unsqueeze(2) * u_BLD.unsqueeze(-1))
        return ((h_BLDN @ C_BLN.unsqueeze(-1)).squeeze(3) + D * u_BLD) * F.silu(z_BLD)

    return run


def _pscan(decays_BLDN: Tensor, inputs_BLDN: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    return pscan(decays_BLDN, inputs_BLDN)


def _unbind_loop(decays_BLDN: Tensor, inputs_BLDN: Tensor) -> Tensor:
    h, states = torch.zeros_like(inputs_BLDN[:, 0]), []
    for decay, x in zip(decays_BLDN.unbind(1), inputs_BLDN.unbind(1), strict=True):
        h = decay * h + x
        states.append(h)
    return torch.stack(states, 1)


def scan_slicing_loop(u_BLD, raw_dt_BLD, A, B_BLN, C_BLN, D, z_BLD):
    """Slices small inputs at every step: each slice's gradient is a full-size tensor, so backward is quadratic in L."""
    dt_BLD, h, outputs = F.softplus(raw_dt_BLD), u_BLD.new_zeros(u_BLD.shape[0], *A.shape), []
    for t in range(u_BLD.shape[1]):
        dt_BD1 = dt_BLD[:, t, :, None]
        h = torch.exp(dt_BD1 * A) * h + dt_BD1 * B_BLN[:, t, None] * u_BLD[:, t, :, None]
        outputs.append((h @ C_BLN[:, t, :, None]).squeeze(-1))
    return (torch.stack(outputs, 1) + D * u_BLD) * F.silu(z_BLD)


def make_inputs(batch: int, length: int) -> list[Tensor]:
    shapes = [(batch, length, CHANNELS)] * 2 + [(CHANNELS, STATES)] + [(batch, length, STATES)] * 2
    inputs = [torch.randn(shape) for shape in [*shapes, (CHANNELS,), (batch, length, CHANNELS)]]
    inputs[1] -= 4  # softplus gives steps near 0.02, as the published initialisation does
    inputs[2] = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    return [x.requires_grad_() for x in inputs]


def _error() -> float:
    """Output and gradients of ours against the fp64 reference on a short sequence."""
    inputs = make_inputs(1, 48)
    channels_first = (0, 1, 3, 4, 6)

    def reference(*x: Tensor) -> Tensor:
        u, dt, A, B, C, D, z = (v.transpose(1, 2) if i in channels_first else v for i, v in enumerate(x))
        y = selective_scan_reference(u, dt, A, B, C, D, z, delta_softplus=True)
        assert isinstance(y, Tensor)
        return y.transpose(1, 2)

    expected = gradients(reference, [x.detach().double().requires_grad_() for x in inputs])
    return relative_error(gradients(scan_ours, inputs), expected)


def measure() -> list[Row]:
    """fp32, at length 1,024."""
    peers = {
        "mambapy pscan": _with_scan(_pscan),
        "unbind loop": _with_scan(_unbind_loop),
        "slicing loop": scan_slicing_loop,
    }
    case, inputs = f"B{BATCH} L{LENGTH} D{CHANNELS} N{STATES}, float32", make_inputs(BATCH, LENGTH)
    return compare("selective_scan", case, scan_ours, peers, inputs, limit=1e-5, error=_error(), rounds=ROUNDS)


def of_layer(
    u_BLD: Tensor, dt_BLD: Tensor, A: Tensor, B_BLN: Tensor, C_BLN: Tensor, D: Tensor, z_BLD: Tensor, bias: Tensor,
    *seq_idx: Tensor, scan: Callable[..., Tensor | tuple[Tensor, Tensor]] = selective_scan,
) -> Tensor:  # fmt: skip
    """As a Mamba-1 layer calls it, on views of channels-last tensors: (B, L, D)."""
    u, dt, B, C, z = (x.transpose(1, 2) for x in (u_BLD, dt_BLD, B_BLN, C_BLN, z_BLD))
    packed = {"seq_idx": seq_idx[0]} if seq_idx else {}
    y = scan(u, dt, A, B, C, D, z, bias, delta_softplus=True, **packed)
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def gpu_cases() -> Iterator[Case]:
    """The scan of a Mamba-1 layer of each size's model width, plain and packed, in 16 bits."""
    for size, packing in itertools.product(SIZES, (False, True)):
        D, N, tokens = EXPAND * size.d_model, GPU_STATES, size.batch * size.length
        yield Case(
            op="selective_scan",
            shapes=f"{size.name}: B{size.batch} L{size.length} D{D} N{N}{', packed' if packing else ''}",
            make=partial(_layer, size, packing),
            full=size.batch,
            tiny=1,
            ours=of_layer,
            exact=partial(of_layer, scan=partial(selective_scan, backend="torch")),
            bytes_moved=(tokens * (8 * D + 4 * N), tokens * (22 * D + 12 * N)),
            flops=(7 * tokens * D * N, 26 * tokens * D * N),
            peers={} if packing else {"mamba_ssm": _mamba_ssm},
        )


def _layer(size: Size, packing: bool, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    on_a_card = device == "cuda"  # elsewhere as many tokens as fill a lane, and channels: more compile alike
    length, D, N = size.length if on_a_card else 130, EXPAND * size.d_model if on_a_card else 64, GPU_STATES
    u, dt, B, C, z = leaves(
        *(torch.randn(batch, length, width) for width in (D, D, N, N, D)), dtype=dtype, device=device
    )
    A, skip, bias = -torch.arange(1.0, N + 1).repeat(D, 1), torch.ones(D), torch.linspace(-6.9, -2.3, D)
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

    fixed, fixed_backward, fixed_programs = dict(triton.FORWARD), dict(triton.BACKWARD), triton.MIN_PROGRAMS
    forward = [(16, 8, 128), (16, 8, None), (8, 4, 128), (8, 4, 168), (32, 16, 128)]
    backward = [(8, 4, None), (8, 4, 168), (8, 4, 128), (16, 8, None), (4, 4, 128)]
    for case in gpu_cases():
        inputs = case.make(case.full, case.dtype, "cuda")
        taken: list[tuple[float, str, int, tuple[int | None, ...]]] = []
        for lane_tokens, options in itertools.product((4, 8), forward):
            op.LANE_TOKENS = lane_tokens
            triton.FORWARD.update(zip(("CHANNELS", "num_warps", "maxnreg"), options, strict=True))
            taken.append((do_bench(partial(case.forward, case.ours, inputs)), "forward", lane_tokens, options))
        triton.FORWARD.update(fixed)
        for lane_tokens, options, programs in itertools.product((4, 8), backward, (256, 512, 1024)):
            op.LANE_TOKENS, triton.MIN_PROGRAMS = lane_tokens, programs
            triton.BACKWARD.update(zip(("CHANNELS", "num_warps", "maxnreg"), options, strict=True))
            run = partial(case.forward_backward, case.ours, inputs)
            taken.append((do_bench(run), "forward+backward", lane_tokens, (*options, programs)))
        triton.BACKWARD.update(fixed_backward)
        op.LANE_TOKENS, triton.MIN_PROGRAMS = 8, fixed_programs
        print(case.shapes, *(f"{ms:.3f} ms {rest}" for ms, *rest in sorted(taken, key=lambda row: row[0])), sep="\n")


def main() -> None:
    """Print the table."""
    if sys.argv[1:] == ["sweep"]:
        return sweep()
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
