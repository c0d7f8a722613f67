"""Speed of S4D's kernel (beside the published Vandermonde product) and of its convolution, forward and backward."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.lti_conv.init import s4d_init
from kernels.lti_conv.op import lti_conv
from kernels.lti_conv.reference import lti_conv_reference
from kernels.lti_conv.s4d import s4d_kernel

BATCH, LENGTH, CHANNELS, STATES = 2, 1024, 512, 16
ROUNDS = 7


def vandermonde_kernel(dt_D: Tensor, A_DN: Tensor, C_DN: Tensor, length: int) -> Tensor:
    """The published way: all powers exp(l·dt·A), (D, N, L), then a sum over n."""
    step = dt_D[:, None] * A_DN
    powers_DNL = torch.exp(step.unsqueeze(-1) * torch.arange(length))
    return 2 * torch.einsum("dn,dnl->dl", C_DN * (torch.exp(step) - 1) / A_DN, powers_DNL).real


def _milliseconds(candidates: dict[str, Callable[[], Tensor]], leaves: list[Tensor]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(ROUNDS + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            torch.autograd.grad(run().sum(), leaves, allow_unused=True)
            if round_ > 0:  # the first warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _check(u_BDL: Tensor, K_DL: Tensor, seq_idx: Tensor) -> None:
    u, K, documents = u_BDL[:, :4, :100].double(), K_DL[:4, :100].double(), seq_idx[:, :100]
    error = (lti_conv(u.float(), K.float(), seq_idx=documents) - lti_conv_reference(u, K, seq_idx=documents)).norm()
    if not error < 1e-5 * u.norm():
        raise SystemExit(f"lti_conv is wrong by {float(error):.1e}: no speed is shown")


def main() -> None:
    """Print the table: median and least milliseconds."""
    u_BDL = torch.randn(BATCH, CHANNELS, LENGTH, requires_grad=True)
    dt_D = torch.exp(torch.empty(CHANNELS).uniform_(-6.9, -2.3)).requires_grad_()
    A_DN = s4d_init("lin", STATES).to(torch.complex64).repeat(CHANNELS, 1).requires_grad_()
    C_DN = torch.randn(CHANNELS, STATES // 2, dtype=torch.complex64).requires_grad_()
    seq_idx = (torch.rand(BATCH, LENGTH) < 0.01).int().cumsum(1)
    with torch.no_grad():
        K_DL = s4d_kernel(dt_D, A_DN, C_DN, LENGTH)
        _check(u_BDL, K_DL, seq_idx)
    K_DL.requires_grad_()
    times = _milliseconds(
        {
            "s4d_kernel": lambda: s4d_kernel(dt_D, A_DN, C_DN, LENGTH),
            "Vandermonde, complex64": lambda: vandermonde_kernel(dt_D, A_DN, C_DN, LENGTH),
            "lti_conv": lambda: lti_conv(u_BDL, K_DL),
            "lti_conv, packed": lambda: lti_conv(u_BDL, K_DL, seq_idx=seq_idx),
        },
        [dt_D, A_DN, C_DN, u_BDL, K_DL],
    )
    print(
        f"S4D, forward + backward, B{BATCH} L{LENGTH} D{CHANNELS} N{STATES}, fp32, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; {int((seq_idx.diff() != 0).sum()) + BATCH} documents when packed"
    )
    for name, ms in times.items():
        print(f"  {name:24} {statistics.median(ms):7.1f} ms  (least {min(ms):.1f})")


if __name__ == "__main__":
    main()
