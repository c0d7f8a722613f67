"""S4D's kernel and its convolution beside the published forms.

The convolution's bytes are those of u, K and y. Operations are left out: they depend on how the
transform is cut.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.cases import Case, Size, documents, leaves
from kernels.lti_conv.init import s4d_init
from kernels.lti_conv.op import lti_conv
from kernels.lti_conv.s4d import s4d_kernel

STATES = 16


def vandermonde_kernel(
    dt_D: Tensor,
    A_DN: Tensor,
    C_DN: Tensor,
    length: int,
) -> Tensor:
    """The published way: all powers exp(l·dt·A), (D, N, L), then a sum over n."""
    step_DN = dt_D[:, None] * A_DN
    positions_L = torch.arange(length, device=dt_D.device)
    powers_DNL = torch.exp(step_DN.unsqueeze(-1) * positions_L)
    weights_DN = C_DN * (torch.exp(step_DN) - 1) / A_DN
    return 2 * torch.einsum("dn,dnl->dl", weights_DN, powers_DNL).real


def padded_fft(u_BDL: Tensor, K_DL: Tensor) -> Tensor:
    """The published convolution, one document a row."""
    length = u_BDL.shape[-1]
    num_points = 2 * length
    u_BDF = torch.fft.rfft(u_BDL, n=num_points)
    K_DF = torch.fft.rfft(K_DL, n=num_points)
    y_BDL = torch.fft.irfft(u_BDF * K_DF, n=num_points)
    return y_BDL[..., :length]


def document_by_document(u_BDL: Tensor, K_DL: Tensor, seq_idx: Tensor) -> Tensor:
    """The same for rows that are cut at the same places."""
    _, lengths = seq_idx[0].unique_consecutive(return_counts=True)
    outputs = []
    for u in u_BDL.split(lengths.tolist(), -1):
        length = u.shape[-1]
        outputs.append(padded_fft(u, K_DL[:, :length]))
    return torch.cat(outputs, -1)


def cases(size: Size, _: torch.dtype) -> Iterator[Case]:
    """The kernel, the convolution, and the convolution of packed rows, in fp32."""
    D = size.d_model
    L = size.length
    tokens = size.tokens
    yield Case(
        op="s4d_kernel",
        shapes=f"{size.name}: L{L} D{D} N{STATES}",
        make=partial(_parameters, D),
        full=L,
        tiny=70,
        ours=partial(_of_length, s4d_kernel),
        exact=partial(_of_length, vandermonde_kernel),
        bytes_moved=(4 * D * L, 8 * D * L),
        flops=(0, 0),
        dtype=torch.float32,
        loose=1e-4,
    )
    for packing in (False, True):
        yield Case(
            op="lti_conv",
            shapes=f"{size.name}: B{size.batch} L{L} D{D}{', packed' if packing else ''}",
            make=partial(_signals, size, packing),
            full=tokens,
            tiny=70,
            ours=_packed if packing else lti_conv,
            exact=document_by_document if packing else padded_fft,
            bytes_moved=(
                4 * D * (2 * tokens + L),
                4 * D * (5 * tokens + 3 * L),
            ),
            flops=(0, 0),
            dtype=torch.float32,
        )


def _of_length(
    kernel,
    dt_D: Tensor,
    A_DN: Tensor,
    C_DN: Tensor,
    positions_L: Tensor,
) -> Tensor:
    return kernel(dt_D, A_DN, C_DN, len(positions_L))


def _packed(u_BDL: Tensor, K_DL: Tensor, seq_idx: Tensor) -> Tensor:
    return lti_conv(u_BDL, K_DL, seq_idx=seq_idx)


def _parameters(
    D: int,
    length: int,
    _: torch.dtype,
    device: str,
) -> list[Tensor]:
    log_dt_D = torch.empty(D).uniform_(-6.9, -2.3)  # steps of 0.001 to 0.1, as S4D draws them
    dt_D = torch.exp(log_dt_D)
    A_N = s4d_init("lin", STATES)
    A_DN = A_N.to(torch.complex64).repeat(D, 1)
    C_DN = torch.randn(D, STATES // 2, dtype=torch.complex64)
    inputs = []
    for parameter in (dt_D, A_DN, C_DN):
        inputs.append(parameter.to(device).requires_grad_())
    return [*inputs, torch.arange(length, device=device)]


def _signals(
    size: Size,
    packing: bool,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    batch, length = size.rows(tokens)
    decay_L = torch.exp(-0.05 * torch.arange(length))
    K_DL = torch.randn(size.d_model, length) * decay_L
    u_BLD = torch.randn(batch, length, size.d_model)
    u_BDL = u_BLD.transpose(1, 2)  # a layer hands over a transposed view
    inputs = leaves(u_BDL, K_DL, dtype=dtype, device=device)
    if packing:
        inputs.append(documents(batch, length, device))
    return inputs
