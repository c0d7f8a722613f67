"""Causal convolution of every channel with its own kernel as long as the sequence, by FFT, never across documents.

Shapes: B batch, D channels, L length, S documents of a bucket, W positions of the longest of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_devices, check_documents, check_floats, check_integers


def lti_conv(u_BDL: Tensor, K_DL: Tensor, D: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
    """y_t = sum over s <= t of K_{t-s} u_s, plus D u_t: (B, D, L) in u's dtype.

    Computed in fp32 (fp64 for fp64 ``u``), by FFTs of at least 2L points, so that nothing wraps round. Documents of
    packed rows are gathered by length into at most log2(L) + 1 buckets, padded to less than twice their length, and
    each bucket is convolved on its own: exact, with no loop over positions or documents.

    Args:
        u_BDL: (B, D, L) real, of any strides.
        K_DL: (D, L) real.
        D: (D,), the skip connection.
        seq_idx: (B, L) integers from 0, never decreasing along a row: a document ends where they change.

    Raises:
        ValueError: a shape, dtype, device or document number that does not fit.
    """
    _check(u_BDL, K_DL, D, seq_idx)
    dtype = torch.promote_types(u_BDL.dtype, torch.float32)
    u, K_DL = u_BDL.to(dtype), K_DL.to(dtype)
    y = _causal_conv(u, K_DL) if seq_idx is None else _conv_documents(u, K_DL, seq_idx)
    y = y if D is None else y + D.to(dtype)[:, None] * u
    return y.to(u_BDL.dtype)


def _causal_conv(u_BDL: Tensor, K_DL: Tensor) -> Tensor:
    """By FFT, over the last dim; both of the same length."""
    length = u_BDL.shape[-1]
    if u_BDL.numel() == 0:
        return u_BDL * K_DL
    num_points = _fft_length(2 * length)
    spectrum = torch.fft.rfft(u_BDL, n=num_points) * torch.fft.rfft(K_DL, n=num_points)
    return torch.fft.irfft(spectrum, n=num_points)[..., :length]


def _fft_length(least: int) -> int:
    """The smallest 2^k, 3·2^k or 5·2^k that is not below ``least``: sizes with fast FFTs, and few of them."""
    power = 1 << (least - 1).bit_length()
    return min(size for size in (power, power // 4 * 3, power // 8 * 5) if size >= least)


def _conv_documents(u_BDL: Tensor, K_DL: Tensor, seq_idx_BL: Tensor) -> Tensor:
    """Each document convolved alone: gathered to rows (S, D, W) by bucket of length, and put back."""
    batch, channels, length = u_BDL.shape
    starts, lengths = _documents(seq_idx_BL)
    u_TD = u_BDL.transpose(1, 2).reshape(batch * length, channels)
    positions, outputs = [torch.empty(0, dtype=torch.long, device=u_BDL.device)], [u_TD[:0]]
    buckets = torch.ceil(torch.log2(lengths.double()))
    for bucket in buckets.unique().tolist():
        in_bucket = buckets == bucket
        offset_W = torch.arange(int(lengths[in_bucket].max()), device=u_BDL.device)
        valid_SW = offset_W < lengths[in_bucket, None]
        position_SW = torch.where(valid_SW, starts[in_bucket, None] + offset_W, 0)
        u_SWD = u_TD.index_select(0, position_SW.flatten()).unflatten(0, position_SW.shape) * valid_SW[..., None]
        y_SWD = _causal_conv(u_SWD.transpose(1, 2), K_DL[:, : len(offset_W)]).transpose(1, 2)
        positions.append(position_SW[valid_SW])
        outputs.append(y_SWD.flatten(0, 1).index_select(0, valid_SW.flatten().nonzero().squeeze(1)))
    y_TD = torch.cat(outputs).index_select(0, torch.cat(positions).argsort())
    return y_TD.reshape(batch, length, channels).transpose(1, 2)


def _documents(seq_idx_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Starts (in flattened positions) and lengths of all documents of all rows."""
    changes_BL = torch.ones_like(seq_idx_BL, dtype=torch.bool)
    changes_BL[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    starts = changes_BL.flatten().nonzero().squeeze(1)
    return starts, F.pad(starts, (0, 1), value=seq_idx_BL.numel()).diff()


def _check(u_BDL: Tensor, K_DL: Tensor, D: Tensor | None, seq_idx: Tensor | None) -> None:
    if u_BDL.dim() != 3:
        raise ValueError(f"u_BDL has shape {tuple(u_BDL.shape)}, expected (B, D, L)")
    batch, channels, length = u_BDL.shape
    if K_DL.shape != (channels, length):
        raise ValueError(f"K_DL has shape {tuple(K_DL.shape)}, expected {(channels, length)}")
    if D is not None and D.shape != (channels,):
        raise ValueError(f"D has shape {tuple(D.shape)}, expected {(channels,)}")
    if seq_idx is not None and seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, expected {(batch, length)}")
    check_floats(u_BDL=u_BDL, K_DL=K_DL, D=D)
    check_integers(seq_idx=seq_idx)
    check_devices(u_BDL=u_BDL, K_DL=K_DL, D=D, seq_idx=seq_idx)
    check_documents(seq_idx)
