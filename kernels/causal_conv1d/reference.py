"""Depthwise causal convolution as its definition says: one shifted product a tap.

Legend: B batch, L length, D channels, K taps; the halo of (K - 1) * dilation inputs before the row
    is written Z.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_runs(seq_idx_BL: Tensor | None, x_BLD: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, ...: a new one starts wherever ``seq_idx`` changes."""
    run_BL = torch.zeros(x_BLD.shape[:2], dtype=torch.int64, device=x_BLD.device)
    if seq_idx_BL is not None and x_BLD.shape[1] > 0:
        run_BL[:, 1:] = (seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]).cumsum(1)
    return run_BL


def causal_conv1d_reference(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
    initial_states_BZD: Tensor | None = None,
    activation: str | None = None,
    dilation: int = 1,
) -> tuple[Tensor, Tensor]:
    """y[t] = act(bias + sum_k weight[:, k] x[t - (K - 1 - k) dilation]), over inputs of the
    document of t only.

    Returns:
        y (B, L, D) and the final states (B, Z, D), both in the dtype of x.
    """
    (_, L, _) = x_BLD.shape
    K = weight_DK.shape[1]
    halo = (K - 1) * dilation
    before_BZD = x_BLD.new_zeros(x_BLD.shape[0], halo, x_BLD.shape[2])
    if initial_states_BZD is not None:
        before_BZD = initial_states_BZD.to(x_BLD.dtype)
    padded = torch.cat((before_BZD, x_BLD), 1)
    run_BL = document_runs(seq_idx_BL, x_BLD)
    padded_run = F.pad(run_BL, (halo, 0))
    y_BLD = torch.zeros_like(x_BLD) if bias_D is None else bias_D.to(x_BLD.dtype).expand_as(x_BLD)
    for k in range(K):
        same_BL = padded_run[:, k * dilation : k * dilation + L] == run_BL
        tap_BLD = torch.where(same_BL[..., None], padded[:, k * dilation : k * dilation + L], 0)
        y_BLD = y_BLD + tap_BLD * weight_DK[:, k].to(x_BLD.dtype)
    kept = padded_run[:, L:] == padded_run[:, -1:]
    final_BZD = torch.where(kept[..., None], padded[:, L:], 0)
    return F.silu(y_BLD) if activation == "silu" else y_BLD, final_BZD
