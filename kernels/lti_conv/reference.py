"""The recurrent form of S4D and the convolution by definition, position by position:
the oracles.
"""

import torch
from torch import Tensor

from kernels.lti_conv.s4d import s4d_step


def s4d_scan(
    u_BDL: Tensor,
    Abar_DN: Tensor,
    Bbar_DN: Tensor,
    C_DN: Tensor,
    D: Tensor | None = None,
    state_BDN: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``s4d_step`` at every position, from ``state_BDN`` (default 0), forgetting where ``seq_idx``
    (B, L) changes.

    Returns:
        y (B, D, L) and the last state (B, D, N), complex.
    """
    batch, channels, length = u_BDL.shape
    if state_BDN is None:
        state_BDN = Abar_DN.new_zeros(batch, channels, Abar_DN.shape[1])
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state_BDN = state_BDN * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        y_BD, state_BDN = s4d_step(
            state_BDN,
            u_BDL[:, :, t],
            Abar_DN,
            Bbar_DN,
            C_DN,
            D,
        )
        outputs.append(y_BD)
    return (torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(u_BDL)), state_BDN


def lti_conv_reference(
    u_BDL: Tensor,
    K_DL: Tensor,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """y_t = sum over s <= t of the same document of K_{t-s} u_s, plus D u_t: a Toeplitz matrix per
    row and channel.
    """
    length = u_BDL.shape[-1]
    position = torch.arange(length, device=u_BDL.device)
    lag = position[:, None] - position
    toeplitz_DLL = torch.where(
        lag >= 0, K_DL[:, lag.clamp_min(0)], torch.zeros_like(K_DL[:, :1, None])
    )
    y = torch.einsum("dts,bds->bdt", toeplitz_DLL, u_BDL)
    if seq_idx is not None:
        starts = torch.cat(
            [torch.zeros_like(seq_idx[:, :1]), (seq_idx[:, 1:] != seq_idx[:, :-1]).to(seq_idx)],
            dim=1,
        )
        document = starts.cumsum(1)
        same_BLL = (document[:, :, None] == document[:, None]).to(u_BDL)
        y = torch.einsum(
            "dts,bts,bds->bdt",
            toeplitz_DLL,
            same_BLL,
            u_BDL,
        )
    return y if D is None else y + D[:, None] * u_BDL
