"""Depthwise causal convolution as its definition says: one shifted product a tap.

Legend: B batch, L length, D channels, K taps; the halo of (K - 1) * dilation inputs before the row
is written Z.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_runs(seq_idx_BL: Tensor | None, x_BLD: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, ...: a new one starts wherever ``seq_idx`` changes."""
    batch, length, _ = x_BLD.shape
    run_BL = torch.zeros(batch, length, dtype=torch.int64, device=x_BLD.device)
    if seq_idx_BL is not None and length > 0:
        starts = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
        run_BL[:, 1:] = starts.cumsum(1)
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
    """y[t] = act(bias + sum_k weight[:, k] x[t - (K - 1 - k) dilation]).

    The sum runs over inputs of the document of t only.

    Returns:
        y (B, L, D) and the final states (B, Z, D), both in the dtype of x.
    """
    B, L, D = x_BLD.shape
    K = weight_DK.shape[1]
    halo = (K - 1) * dilation
    dtype = x_BLD.dtype
    if initial_states_BZD is None:
        before_BZD = x_BLD.new_zeros(B, halo, D)
    else:
        before_BZD = initial_states_BZD.to(dtype)
    padded = torch.cat((before_BZD, x_BLD), 1)
    run_BL = document_runs(seq_idx_BL, x_BLD)
    padded_run = F.pad(run_BL, (halo, 0))  # the inputs before the row are of its first document

    y_BLD = torch.zeros_like(x_BLD)
    if bias_D is not None:
        y_BLD = bias_D.to(dtype).expand_as(x_BLD)
    for k in range(K):
        places = slice(k * dilation, k * dilation + L)
        same_BL1 = (padded_run[:, places] == run_BL)[..., None]
        tap_BLD = torch.where(same_BL1, padded[:, places], 0)
        weight_D = weight_DK[:, k].to(dtype)
        y_BLD = y_BLD + tap_BLD * weight_D
    if activation == "silu":
        y_BLD = F.silu(y_BLD)

    kept_BZ = padded_run[:, L:] == padded_run[:, -1:]
    final_BZD = torch.where(kept_BZ[..., None], padded[:, L:], 0)
    return y_BLD, final_BZD
