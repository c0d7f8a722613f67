"""Head and cross-entropy with all logits in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> Tensor:
    """Sum over valid targets of -log softmax(hidden weight^T)[target]; rows from ``vocab_size`` on
    are no tokens.
    """
    logits_TV = F.linear(hidden_TD, weight_VD)[:, :vocab_size]
    log_probs_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)
    valid_T = targets_T != ignore_index
    picked_T = log_probs_TV.gather(1, targets_T.long().masked_fill(~valid_T, 0)[:, None])[:, 0]
    return -picked_T[valid_T].sum()
