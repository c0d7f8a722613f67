"""The selective scan of Mamba-1, step by step: the oracle (Gu & Dao 2023, Algorithm 2 and section
3.3).

Shapes: B batch, D channels, L length, N state size, G groups of B and C (channel d reads group d //
    (D / G)).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;  y_t = (C_t · h_t + D u_t) silu(z_t), in the
    inputs' dtype.

    Arguments and results are those of ``selective_scan``.
    """
    batch, num_channels, length = u.shape
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    B_BDNL, C_BDNL = (_per_channel(x, num_channels) for x in (B, C))
    state_BDN = (
        u.new_zeros(batch, num_channels, A.shape[1]) if initial_state is None else initial_state
    )
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            starts = seq_idx[:, t] != seq_idx[:, t - 1]
            state_BDN = torch.where(starts[:, None, None], torch.zeros_like(state_BDN), state_BDN)
        delta_BD1 = delta[:, :, t, None]
        u_BD1 = u[:, :, t, None]
        state_BDN = torch.exp(delta_BD1 * A) * state_BDN + delta_BD1 * B_BDNL[..., t] * u_BD1
        outputs.append((state_BDN * C_BDNL[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(u)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return (y, state_BDN) if return_last_state else y


def _per_channel(x: Tensor, num_channels: int) -> Tensor:
    """(B, N, L) or (B, G, N, L) to (B, D, N, L)."""
    x = x[:, None] if x.dim() == 3 else x
    return x.repeat_interleave(num_channels // x.shape[1], dim=1)
