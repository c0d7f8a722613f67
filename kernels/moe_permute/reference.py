"""Sorting token rows by expert in plain PyTorch: what `kernels.moe_permute` must equal.

Legend: T tokens, K chosen experts, D model width, M routed copies (T x K less the dropped ones).
"""

import torch


def reference_permute(
    x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """x_MD: for expert 0, 1, ... the rows of the tokens that chose it,
    in order of (token, slot).
    """
    rows = [
        x_TD[token]
        for expert in range(num_experts)
        for token, ids_K in enumerate(expert_ids_TK.tolist())
        for chosen in ids_K
        if chosen == expert
    ]
    return torch.stack(rows) if rows else x_TD[:0]


def reference_unpermute(
    y_MD: torch.Tensor, expert_ids_TK: torch.Tensor, num_experts: int, weights_TK: torch.Tensor
) -> torch.Tensor:
    """y_TD: each token's copies, weighted and summed; a dropped slot (-1) adds nothing."""
    outputs = [y_MD.new_zeros(y_MD.shape[1]) for _ in expert_ids_TK]
    row = 0
    for expert in range(num_experts):
        for token, slot in (expert_ids_TK == expert).nonzero().tolist():
            outputs[token] = outputs[token] + weights_TK[token, slot] * y_MD[row]
            row += 1
    return torch.stack(outputs) if outputs else y_MD.new_zeros(0, y_MD.shape[1])
