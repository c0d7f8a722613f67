"""Speed of the selective scan, forward and backward, beside mambapy's parallel scan and two loops over time.

All candidates take the same channels-last inputs, with D, softplus and gate; each round runs all, one after another.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selective_scan.op import selective_scan
from kernels.selective_scan.reference import selective_scan_reference

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


def _gradients(scan: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    y = scan(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y)))


def _check(candidates: dict[str, Callable[..., Tensor]]) -> None:
    """Every candidate's output and gradients against the fp64 reference on a short sequence."""
    inputs = make_inputs(1, 48)
    channels_first = (0, 1, 3, 4, 6)

    def reference(*x: Tensor) -> Tensor:
        u, dt, A, B, C, D, z = (v.transpose(1, 2) if i in channels_first else v for i, v in enumerate(x))
        y = selective_scan_reference(u, dt, A, B, C, D, z, delta_softplus=True)
        assert isinstance(y, Tensor)
        return y.transpose(1, 2)

    expected = _gradients(reference, [x.detach().double().requires_grad_() for x in inputs])
    for name, scan in candidates.items():
        for got, oracle in zip(_gradients(scan, inputs), expected, strict=True):
            error = float((got - oracle).norm() / oracle.norm())
            if not error < 1e-5:
                raise SystemExit(f"{name} is wrong by {error:.1e}: no speed is shown")


def main() -> None:
    """Print the table: median and least milliseconds, and the median over rounds of peer / ours."""
    candidates: dict[str, Callable[..., Tensor]] = {
        "ours": scan_ours,
        "mambapy pscan": _with_scan(_pscan),
        "unbind loop": _with_scan(_unbind_loop),
        "slicing loop": scan_slicing_loop,
    }
    _check(candidates)
    inputs = make_inputs(BATCH, LENGTH)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(ROUNDS + 1):
        for name, scan in candidates.items():
            start = time.perf_counter()
            _gradients(scan, inputs)
            if round_ > 0:  # the first warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    print(
        f"selective scan, forward + backward, B{BATCH} L{LENGTH} D{CHANNELS} N{STATES}, fp32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, ms in times.items():
        ratio = statistics.median(peer / ours for peer, ours in zip(ms, times["ours"], strict=True))
        print(f"  {name:14} {statistics.median(ms):7.0f} ms  (least {min(ms):.0f})  {ratio:5.1f}x ours")


if __name__ == "__main__":
    main()
