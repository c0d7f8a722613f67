"""Speed of the selective scan, forward and backward, beside mambapy's parallel scan and two loops over time.

All candidates take the same channels-last inputs, with D, softplus and gate; each round runs all, one after another.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selective_scan.op import selective_scan
from kernels.selective_scan.reference import selective_scan_reference
from kernels.timing import Row, compare, gradients, machine, print_rows, relative_error

BATCH, LENGTH, CHANNELS, STATES = 2, 1024, 512, 16
ROUNDS = 5


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


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
