"""DeepSeek-V3's routing, a token and an expert at a time (arXiv 2412.19437 section 2.1.2): oracle
of `kernels.route`.

Legend: T tokens, E experts, K chosen experts.
"""

import torch


def reference_route(
    logits_TE: torch.Tensor,
    top_k: int,
    scores: str,
    bias_E: torch.Tensor | None,
    route_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_ids_TK, weights_TK), eq. 12 to 16; of equal scores the lower expert wins."""
    ids_TK = []
    weights_TK = []
    for logits_E in logits_TE:
        scores_E = (
            1 / (1 + torch.exp(-logits_E))
            if scores == "sigmoid"
            else torch.exp(logits_E) / torch.exp(logits_E).sum()
        )
        biased = (scores_E if bias_E is None else scores_E + bias_E).tolist()
        chosen = sorted(range(len(biased)), key=lambda expert: (-biased[expert], expert))[:top_k]
        ids_TK.append(chosen)
        weights_TK.append(route_scale * scores_E[chosen] / scores_E[chosen].sum())
    return torch.tensor(ids_TK), torch.stack(weights_TK)


def reference_sequence_aux_loss(
    scores_TE: torch.Tensor, expert_ids_TK: torch.Tensor, num_sequences: int
) -> torch.Tensor:
    """Eq. 17 to 20 without alpha, one sequence after another, then the mean."""
    num_experts = scores_TE.shape[1]
    top_k = expert_ids_TK.shape[1]
    losses = []
    for scores, ids in zip(
        scores_TE.chunk(num_sequences), expert_ids_TK.chunk(num_sequences), strict=True
    ):
        length = scores.shape[0]
        loss = scores.new_zeros(())
        for expert in range(num_experts):
            f = num_experts / (top_k * length) * float((ids == expert).sum())
            p = sum(scores[t, expert] / scores[t].sum() for t in range(length)) / length
            loss = loss + f * p
        losses.append(loss)
    return torch.stack(losses).mean()


def reference_drop_over_capacity(expert_ids_TK: torch.Tensor, capacity: int) -> torch.Tensor:
    """Tokens in order take a place each; who finds an expert full gets -1."""
    kept_TK = expert_ids_TK.clone()
    taken = dict.fromkeys(expert_ids_TK.flatten().tolist(), 0)
    for token, ids_K in enumerate(expert_ids_TK.tolist()):
        for slot, expert in enumerate(ids_K):
            taken[expert] += 1
            if expert >= 0 and taken[expert] > capacity:
                kept_TK[token, slot] = -1
    return kept_TK
