"""Router scores, the choice of experts, and their weights (DeepSeek-V3, arXiv 2412.19437 section 2.1.2).

Plain PyTorch on every device: the tensors are small.

Legend: T tokens, E experts, K chosen experts.
Determinism: bitwise from run to run; of equal scores the lower expert wins, on every device.
"""

from typing import Literal

import torch


def route(
    logits_TE: torch.Tensor,
    top_k: int,
    scores: Literal["sigmoid", "softmax"] = "sigmoid",
    bias_E: torch.Tensor | None = None,
    route_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score every expert, choose ``top_k`` by score plus bias, weigh the chosen by their unbiased scores.

    weights = route_scale * s / sum(s over the chosen); eq. 12 to 16. The bias decides who is chosen and nothing else.

    Args:
        logits_TE: fp32 (or fp64); 16-bit logits flip near ties, so they are refused.
        top_k: K, between 1 and E.
        scores: sigmoid (V3) or softmax over all experts.
        bias_E: fp32 balancing bias (`update_bias`); None for none.
        route_scale: factor on the normalised weights.

    Returns:
        expert_ids_TK int64 by falling biased score, weights_TK and scores_TE in the dtype of the logits, both
        differentiable in the logits.

    Raises:
        ValueError: shapes, dtypes or names that do not fit.
    """
    if logits_TE.dim() != 2 or logits_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits_TE is {tuple(logits_TE.shape)} {logits_TE.dtype}, expected (T, E) float32 or float64")
    if scores not in ("sigmoid", "softmax"):
        raise ValueError(f"scores is {scores!r}, expected 'sigmoid' or 'softmax'")
    scores_TE = torch.sigmoid(logits_TE) if scores == "sigmoid" else torch.softmax(logits_TE, -1)
    expert_ids_TK = choose_experts(scores_TE, top_k, bias_E)
    chosen_TK = scores_TE.gather(1, expert_ids_TK)
    # All chosen sigmoids can underflow to zero; then every weight is zero.
    weights_TK = chosen_TK * (route_scale / chosen_TK.sum(1, keepdim=True).clamp_min(torch.finfo(chosen_TK.dtype).tiny))
    return expert_ids_TK, weights_TK, scores_TE


@torch.no_grad()
def choose_experts(scores_TE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None = None) -> torch.Tensor:
    """expert_ids_TK int64: the ``top_k`` experts of the largest score plus bias; of equal ones the lower expert.

    Compared in fp32.

    Raises:
        ValueError: ``top_k`` or the bias does not fit the scores.
    """
    num_experts = scores_TE.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to the {num_experts} experts")
    if bias_E is not None:
        if tuple(bias_E.shape) != (num_experts,) or bias_E.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"bias_E is {tuple(bias_E.shape)} {bias_E.dtype}, expected ({num_experts},) float32")
        scores_TE = scores_TE + bias_E
    # topk leaves the order of equal values open, and a stable sort takes 5 times as long at 256 experts (CPU). So topk
    # of distinct integers: the bits of an fp32 in an order that is that of the numbers, then the lower expert first.
    bits_TE = (scores_TE.float() + 0.0).view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    keys_TE = ordered_TE.long() * 2**32 - torch.arange(num_experts, device=scores_TE.device)
    return keys_TE.topk(top_k, dim=1).indices
