"""Causal convolution of every channel with its own kernel, as long as the sequence, by FFT.

It never crosses documents.

Shapes: B batch, D channels, L length, T tokens (B x L); S documents of a bucket, W positions of the
longest of them, N those of all buckets.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import (
    check_devices,
    check_documents,
    check_floats,
    check_integers,
    check_shape,
)


def lti_conv(
    u_BDL: Tensor,
    K_DL: Tensor,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
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
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    return y.to(u_BDL.dtype)


def _causal_conv(u_BDL: Tensor, K_DL: Tensor) -> Tensor:
    """Over the last dim; both of the same length."""
    if u_BDL.numel() == 0:  # an FFT of no points is an error
        return u_BDL * K_DL
    y_BDL: Tensor = _Convolution.apply(u_BDL, K_DL)
    return y_BDL


class _Convolution(torch.autograd.Function):
    """Convolution by FFTs of so many points that nothing wraps round.

    The gradients are correlations: products with conjugates. Spectra are twice as large as their
    signals: backward computes them again. It needs real transforms only, where PyTorch's own
    gradient of one is a complex transform of twice the work.
    """

    @staticmethod
    def forward(ctx: Any, u_BDL: Tensor, K_DL: Tensor) -> Tensor:
        ctx.save_for_backward(u_BDL, K_DL)
        y_BDF = _spectrum(u_BDL)
        y_BDF.mul_(_spectrum(K_DL))
        return _signal(y_BDF, u_BDL.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BDL: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u_BDL, K_DL = ctx.saved_tensors
        length = u_BDL.shape[-1]
        du_BDL = None
        dK_DL = None
        dy_BDF = _spectrum(dy_BDL)
        # K's gradient comes first: u's overwrites the spectrum of dy.
        if ctx.needs_input_grad[1]:
            products_BDF = _spectrum(u_BDL).conj_physical_()
            products_BDF.mul_(dy_BDF)
            dK_DL = _signal(products_BDF.sum(0), length)
        if ctx.needs_input_grad[0]:
            conjugate_DF = _spectrum(K_DL).conj_physical_()
            dy_BDF.mul_(conjugate_DF)
            du_BDL = _signal(dy_BDF, length)
        return du_BDL, dK_DL


def _spectrum(signal_L: Tensor) -> Tensor:
    num_points = _fft_length(2 * signal_L.shape[-1])
    return torch.fft.rfft(signal_L, n=num_points)


def _signal(spectrum_F: Tensor, length: int) -> Tensor:
    num_points = _fft_length(2 * length)
    return torch.fft.irfft(spectrum_F, n=num_points)[..., :length]


def _fft_length(least: int) -> int:
    """The smallest 2^k, 3·2^k or 5·2^k of at least ``least``: few sizes, each with a fast FFT."""
    power = 1 << (least - 1).bit_length()
    for size in (power // 8 * 5, power // 4 * 3):
        if size >= least:
            return size
    return power


def _conv_documents(u_BDL: Tensor, K_DL: Tensor, seq_idx_BL: Tensor) -> Tensor:
    """Each document convolved alone, as a row of its bucket.

    Tokens are spread to the rows of the buckets, and collected from there.
    """
    batch, channels, length = u_BDL.shape
    buckets = _buckets(seq_idx_BL)
    if not buckets:
        return _causal_conv(u_BDL, K_DL)
    token_N = torch.cat([token_SW.flatten() for token_SW in buckets])
    filled = (token_N >= 0).nonzero().squeeze(1)
    place_T = torch.empty_like(filled)
    place_T.scatter_(0, token_N.index_select(0, filled), filled)

    u_TD = u_BDL.transpose(1, 2).reshape(batch * length, channels)
    u_ND = _Move.apply(u_TD, token_N, place_T)
    rows = u_ND.split([token_SW.numel() for token_SW in buckets])
    convolved = []
    for bucket_ND, token_SW in zip(rows, buckets, strict=True):
        width = token_SW.shape[1]
        u_SDW = bucket_ND.view(*token_SW.shape, channels).transpose(1, 2)
        y_SDW = _causal_conv(u_SDW, K_DL[:, :width])
        convolved.append(y_SDW.transpose(1, 2).flatten(0, 1))
    y_TD = _Move.apply(torch.cat(convolved), place_T, token_N)
    return y_TD.reshape(batch, length, channels).transpose(1, 2)


def _buckets(seq_idx_BL: Tensor) -> list[Tensor]:
    """Positions (S, W) of the documents with lengths of each power of two, -1 beyond their ends."""
    starts, lengths = _documents(seq_idx_BL)
    exponents = torch.ceil(torch.log2(lengths.double()))
    buckets = []
    for exponent in exponents.unique().tolist():
        in_bucket = exponents == exponent
        starts_S1 = starts[in_bucket, None]
        lengths_S1 = lengths[in_bucket, None]
        offset_W = torch.arange(int(lengths_S1.max()), device=starts.device)
        buckets.append(torch.where(offset_W < lengths_S1, starts_S1 + offset_W, -1))
    return buckets


class _Move(torch.autograd.Function):
    """Rows to other places: out[m] = x[there[m]], zero where that is -1.

    ``back`` says the same of the way back, which is the gradient's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        there_M: Tensor,
        back_N: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(there_M, back_N)
        out_MD = x_ND.index_select(0, there_M.clamp_min(0))
        empty = (there_M < 0).nonzero().squeeze(1)
        return out_MD.index_fill_(0, empty, 0)

    @staticmethod
    def backward(ctx: Any, dout_MD: Tensor) -> tuple[Tensor, None, None]:
        there_M, back_N = ctx.saved_tensors
        return _Move.apply(dout_MD, back_N, there_M), None, None


def _documents(seq_idx_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Starts (in flattened positions) and lengths of all documents of all rows."""
    changes_BL = torch.ones_like(seq_idx_BL, dtype=torch.bool)
    changes_BL[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    starts = changes_BL.flatten().nonzero().squeeze(1)
    ends = F.pad(starts, (0, 1), value=seq_idx_BL.numel())
    return starts, ends.diff()


def _check(
    u_BDL: Tensor,
    K_DL: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    if u_BDL.dim() != 3:
        raise ValueError(f"u_BDL: got {tuple(u_BDL.shape)}, expected (B, D, L)")
    batch, channels, length = u_BDL.shape
    check_shape("K_DL", K_DL, (channels, length))
    check_shape("D", D, (channels,))
    check_shape("seq_idx", seq_idx, (batch, length))
    check_floats(u_BDL=u_BDL, K_DL=K_DL, D=D)
    check_integers(seq_idx=seq_idx)
    check_devices(
        u_BDL=u_BDL,
        K_DL=K_DL,
        D=D,
        seq_idx=seq_idx,
    )
    check_documents(seq_idx)
