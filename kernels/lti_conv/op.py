"""Causal convolution of every channel with its own kernel as long as the sequence, by FFT, never
across documents.

Shapes: B batch, D channels, L length, T tokens (B x L); S documents of a bucket, W positions of the
longest of them, N those of all buckets.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import check_devices, check_documents, check_floats, check_integers


def lti_conv(
    u_BDL: Tensor, K_DL: Tensor, D: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """y_t = sum over s <= t of K_{t-s} u_s, plus D u_t: (B, D, L) in u's dtype.

    Computed in fp32 (fp64 for fp64 ``u``), by FFTs of at least 2L points, so that nothing wraps
    round. Documents of packed rows are gathered by length into at most log2(L) + 1 buckets, padded
    to less than twice their length, and each bucket is convolved on its own: exact, with no loop
    over positions or documents.

    Args:
        u_BDL: (B, D, L) real, of any strides.
        K_DL: (D, L) real.
        D: (D,), the skip connection.
        seq_idx: (B, L) integers from 0, never decreasing along a row: a document ends where they
            change.

    Raises:
        ValueError: a shape, dtype, device or document number that does not fit.
    """
    _check(u_BDL, K_DL, D, seq_idx)
    dtype = torch.promote_types(u_BDL.dtype, torch.float32)
    u = u_BDL.to(dtype)
    K_DL = K_DL.to(dtype)
    y = _causal_conv(u, K_DL) if seq_idx is None else _conv_documents(u, K_DL, seq_idx)
    y = y if D is None else y + D.to(dtype)[:, None] * u
    return y.to(u_BDL.dtype)


def _causal_conv(u_BDL: Tensor, K_DL: Tensor) -> Tensor:
    """Over the last dim; both of the same length."""
    if u_BDL.numel() == 0:
        return u_BDL * K_DL
    y_BDL: Tensor = _Convolution.apply(u_BDL, K_DL)
    return y_BDL


class _Convolution(torch.autograd.Function):
    """By FFT of so many points that nothing wraps round; the gradients are correlations, products
    with conjugates.

    Spectra are twice as large as their signals: backward computes them again. It needs real
    transforms only, where PyTorch's own gradient of one is a complex transform of twice the work.
    """

    @staticmethod
    def forward(ctx: Any, u_BDL: Tensor, K_DL: Tensor) -> Tensor:
        ctx.save_for_backward(u_BDL, K_DL)
        return _signal(_spectrum(u_BDL).mul_(_spectrum(K_DL)), u_BDL.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BDL: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u_BDL, K_DL = ctx.saved_tensors
        length = u_BDL.shape[-1]
        du_BDL = None
        dK_DL = None
        dy_BDF = _spectrum(dy_BDL)
        if ctx.needs_input_grad[1]:
            dK_DL = _signal(_spectrum(u_BDL).conj_physical_().mul_(dy_BDF).sum(0), length)
        if ctx.needs_input_grad[0]:
            du_BDL = _signal(dy_BDF.mul_(_spectrum(K_DL).conj_physical_()), length)
        return du_BDL, dK_DL


def _spectrum(signal_L: Tensor) -> Tensor:
    return torch.fft.rfft(signal_L, n=_fft_length(2 * signal_L.shape[-1]))


def _signal(spectrum_F: Tensor, length: int) -> Tensor:
    return torch.fft.irfft(spectrum_F, n=_fft_length(2 * length))[..., :length]


def _fft_length(least: int) -> int:
    """The smallest 2^k, 3·2^k or 5·2^k that is not below ``least``: sizes with fast FFTs, and few
    of them.
    """
    power = 1 << (least - 1).bit_length()
    return min(size for size in (power, power // 4 * 3, power // 8 * 5) if size >= least)


def _conv_documents(u_BDL: Tensor, K_DL: Tensor, seq_idx_BL: Tensor) -> Tensor:
    """Each document convolved alone: its tokens spread to a row of its bucket (S, W, D), and
    collected from there.
    """
    batch, channels, length = u_BDL.shape
    starts, lengths = _documents(seq_idx_BL)
    exponents = torch.ceil(torch.log2(lengths.double()))
    buckets = []
    tokens = [torch.empty(0, dtype=torch.long, device=u_BDL.device)]
    for exponent in exponents.unique().tolist():
        in_bucket = exponents == exponent
        offset_W = torch.arange(int(lengths[in_bucket].max()), device=u_BDL.device)
        token_SW = torch.where(
            offset_W < lengths[in_bucket, None], starts[in_bucket, None] + offset_W, -1
        )
        buckets.append(token_SW.shape)
        tokens.append(token_SW.flatten())
    token_N = torch.cat(tokens)
    filled = (token_N >= 0).nonzero().squeeze(1)
    place_T = torch.empty_like(filled).scatter_(0, token_N.index_select(0, filled), filled)

    u_TD = u_BDL.transpose(1, 2).reshape(batch * length, channels)
    rows = _Move.apply(u_TD, token_N, place_T).split([S * W for S, W in buckets])
    convolved = [
        _causal_conv(u_ND.view(S, W, channels).transpose(1, 2), K_DL[:, :W])
        .transpose(1, 2)
        .flatten(0, 1)
        for u_ND, (S, W) in zip(rows, buckets, strict=True)
    ]
    y_TD = _Move.apply(torch.cat(convolved) if convolved else u_TD, place_T, token_N)
    return y_TD.reshape(batch, length, channels).transpose(1, 2)


class _Move(torch.autograd.Function):
    """Rows to other places: out[m] = x[there[m]], zero where that is -1. ``back`` says the same of
    the way back.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, there_M: Tensor, back_N: Tensor) -> Tensor:
        ctx.save_for_backward(there_M, back_N)
        out_MD = x_ND.index_select(0, there_M.clamp_min(0))
        return out_MD.index_fill_(0, (there_M < 0).nonzero().squeeze(1), 0)

    @staticmethod
    def backward(ctx: Any, dout_MD: Tensor) -> tuple[Tensor, None, None]:
        there_M, back_N = ctx.saved_tensors
        return _Move.apply(dout_MD, back_N, there_M), None, None


def _documents(seq_idx_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Starts (in flattened positions) and lengths of all documents of all rows."""
    changes_BL = torch.ones_like(seq_idx_BL, dtype=torch.bool)
    changes_BL[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    starts = changes_BL.flatten().nonzero().squeeze(1)
    return starts, F.pad(starts, (0, 1), value=seq_idx_BL.numel()).diff()


def _check(u_BDL: Tensor, K_DL: Tensor, D: Tensor | None, seq_idx: Tensor | None) -> None:
    if u_BDL.dim() != 3:
        raise ValueError(f"u_BDL: got {tuple(u_BDL.shape)}, expected (B, D, L)")
    batch, channels, length = u_BDL.shape
    if K_DL.shape != (channels, length):
        raise ValueError(f"K_DL: got {tuple(K_DL.shape)}, expected {(channels, length)}")
    if D is not None and D.shape != (channels,):
        raise ValueError(f"D: got {tuple(D.shape)}, expected {(channels,)}")
    if seq_idx is not None and seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx: got {tuple(seq_idx.shape)}, expected {(batch, length)}")
    check_floats(u_BDL=u_BDL, K_DL=K_DL, D=D)
    check_integers(seq_idx=seq_idx)
    check_devices(u_BDL=u_BDL, K_DL=K_DL, D=D, seq_idx=seq_idx)
    check_documents(seq_idx)
