"""S4D's kernel and its convolution beside the published forms: ``python -m kernels.lti_conv.bench``."""

import torch
from torch import Tensor

from kernels.lti_conv.init import s4d_init
from kernels.lti_conv.op import lti_conv
from kernels.lti_conv.reference import lti_conv_reference
from kernels.lti_conv.s4d import s4d_kernel
from kernels.timing import Row, compare, machine, print_rows, relative_error

BATCH, LENGTH, CHANNELS, STATES = 2, 1024, 512, 16
ROUNDS = 7


def ours_kernel(dt_D: Tensor, A_DN: Tensor, C_DN: Tensor) -> Tensor:
    """Zero-order hold."""
    return s4d_kernel(dt_D, A_DN, C_DN, LENGTH)


def vandermonde_kernel(dt_D: Tensor, A_DN: Tensor, C_DN: Tensor) -> Tensor:
    """The published way: all powers exp(l·dt·A), (D, N, L), then a sum over n."""
    step = dt_D[:, None] * A_DN
    powers_DNL = torch.exp(step.unsqueeze(-1) * torch.arange(LENGTH))
    return 2 * torch.einsum("dn,dnl->dl", C_DN * (torch.exp(step) - 1) / A_DN, powers_DNL).real


def padded_fft(u_BDL: Tensor, K_DL: Tensor) -> Tensor:
    """The published convolution, one document a row."""
    length = u_BDL.shape[-1]
    product = torch.fft.rfft(u_BDL, n=2 * length) * torch.fft.rfft(K_DL, n=2 * length)
    return torch.fft.irfft(product, n=2 * length)[..., :length]


def measure() -> list[Row]:
    """The kernel, the convolution, and the convolution over packed documents, which the peer cannot tell apart."""
    dt_D = torch.exp(torch.empty(CHANNELS).uniform_(-6.9, -2.3)).requires_grad_()
    A_DN = s4d_init("lin", STATES).to(torch.complex64).repeat(CHANNELS, 1).requires_grad_()
    C_DN = torch.randn(CHANNELS, STATES // 2, dtype=torch.complex64).requires_grad_()
    seq_idx = (torch.rand(BATCH, LENGTH) < 0.01).int().cumsum(1)
    leaves = [torch.randn(BATCH, CHANNELS, LENGTH), ours_kernel(dt_D, A_DN, C_DN).detach()]
    u, K, documents = leaves[0][:, :4, :100].double(), leaves[1][:4, :100].double(), seq_idx[:, :100]
    packed_error = relative_error(
        [lti_conv(u.float(), K.float(), seq_idx=documents)], [lti_conv_reference(u, K, seq_idx=documents)]
    )
    inputs = [x.requires_grad_() for x in leaves]
    shape, peer = f"B{BATCH} L{LENGTH} D{CHANNELS}, float32", {"padded FFT": padded_fft}

    def packed(u_BDL: Tensor, K_DL: Tensor) -> Tensor:
        return lti_conv(u_BDL, K_DL, seq_idx=seq_idx)

    return [
        *_kernel_rows([dt_D, A_DN, C_DN]),
        *compare("lti_conv", shape, lti_conv, peer, inputs, limit=1e-5, rounds=ROUNDS),
        *compare("lti_conv", f"{shape}, packed", packed, peer, inputs, limit=1e-5, error=packed_error, rounds=ROUNDS),
    ]


def _kernel_rows(inputs: list[Tensor]) -> list[Row]:
    case, peers = f"L{LENGTH} D{CHANNELS} N{STATES}, float32", {"Vandermonde": vandermonde_kernel}
    with torch.no_grad():
        error = relative_error([ours_kernel(*inputs)], [vandermonde_kernel(*inputs)])
    return compare("s4d_kernel", case, ours_kernel, peers, inputs, limit=1e-4, error=error, rounds=ROUNDS)


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
