"""Causal attention with the whole matrix of scores. B batch, L length, H heads, G heads of keys and
values, P width.
"""

import math

import torch
from torch import Tensor


def causal_attention_reference(
    q_BLHP: Tensor,
    k_BLGP: Tensor,
    v_BLGP: Tensor,
    seq_idx_BL: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over the earlier tokens of the same document and the
    token itself.
    """
    batch, length, heads, width = q_BLHP.shape
    if seq_idx_BL is None:
        seq_idx_BL = torch.zeros(
            batch,
            length,
            dtype=torch.int32,
            device=q_BLHP.device,
        )
    visible_BLL = (seq_idx_BL[:, :, None] == seq_idx_BL[:, None]).tril()
    k_BLHP, v_BLHP = (
        part.repeat_interleave(heads // part.shape[2], 2) for part in (k_BLGP, v_BLGP)
    )
    scores_BHLL = torch.einsum("bihp,bjhp->bhij", q_BLHP, k_BLHP) / math.sqrt(width)
    weights_BHLL = scores_BHLL.masked_fill(~visible_BLL[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhp->bihp", weights_BHLL, v_BLHP)
