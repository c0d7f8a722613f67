"""What keeps the load of experts even: auxiliary losses, the balancing bias, capacity.

Legend: T tokens, E experts, K chosen experts, S sequences.
"""

import torch


def sequence_counts(
    expert_ids_TK: torch.Tensor, num_sequences: int, num_experts: int
) -> torch.Tensor:
    """counts_SE int64: how often each sequence chose each expert; -1 counts for nobody.

    Raises:
        ValueError: T is not a multiple of S.
    """
    num_tokens = expert_ids_TK.shape[0]
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(
            f"num_sequences: got {num_sequences}, expected a divisor of the {num_tokens} tokens"
        )
    # Column E collects the ids -1 and is cut off.
    ids_SN = torch.where(expert_ids_TK < 0, num_experts, expert_ids_TK).reshape(num_sequences, -1)
    counts_SE = torch.zeros(
        num_sequences, num_experts + 1, dtype=torch.int64, device=expert_ids_TK.device
    )
    return counts_SE.scatter_add_(1, ids_SN, torch.ones_like(ids_SN))[:, :num_experts].contiguous()


def sequence_aux_loss(
    scores_TE: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    num_sequences: int,
    counts_SE: torch.Tensor | None = None,
) -> torch.Tensor:
    """DeepSeek-V3's balance loss in each sequence, sum_e f_e P_e without alpha; the mean over
    sequences (eq. 17 to 20).

    f_e = E / (K T) * (times that e was chosen), P_e = mean over tokens of s_e / sum(s); 1 when the
    load is even. V3 counts the choice *without* bias: pass ``choose_experts(scores_TE, top_k)``.

    Args:
        scores_TE: what `route` returned; the tokens of a sequence follow each other, all sequences
            have equal length.
        expert_ids_TK: int64; -1 counts for nobody.
        num_sequences: S.
        counts_SE: the whole sequences' counts, where these tokens are a part of them; f_e is theirs
            then.

    Raises:
        ValueError: T is not a multiple of S, or the shapes do not fit.
    """
    num_tokens, num_experts = scores_TE.shape
    if expert_ids_TK.dim() != 2 or expert_ids_TK.shape[0] != num_tokens:
        raise ValueError(
            f"expert_ids_TK: got {tuple(expert_ids_TK.shape)}, expected ({num_tokens}, K)"
        )
    mine_SE = sequence_counts(expert_ids_TK, num_sequences, num_experts)
    if num_tokens == 0:
        return scores_TE.sum()
    length = num_tokens // num_sequences
    top_k = expert_ids_TK.shape[1]
    if counts_SE is None:
        f_SE = mine_SE.to(scores_TE.dtype) * (num_experts / (top_k * length))
    else:
        f_SE = (
            num_experts
            * counts_SE.to(scores_TE.dtype)
            / counts_SE.sum(1, keepdim=True).clamp_min(1)
        )
    shares_TE = scores_TE / scores_TE.sum(1, keepdim=True).clamp_min(
        torch.finfo(scores_TE.dtype).tiny
    )
    return (f_SE * shares_TE.view(num_sequences, length, num_experts).mean(1)).sum(1).mean()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906 eq. 5), without its weight;
    0 if no tokens.
    """
    return torch.logsumexp(logits_TE, 1).square().sum() / max(logits_TE.shape[0], 1)


@torch.no_grad()
def update_bias(bias_E: torch.Tensor, counts_E: torch.Tensor, rate: float) -> torch.Tensor:
    """bias += rate * sign(mean - count), then bias -= its mean, in place (arXiv 2408.15664,
    algorithm 1).

    The mean does not change who is chosen; without it the bias can drift.

    Args:
        bias_E: fp32.
        counts_E: int64 tokens of each expert, summed over all ranks and micro-batches of a step;
            compared exactly.
        rate: gamma, the size of a step.

    Raises:
        ValueError: counts that are not integers (16-bit floats stop counting at 256), or shapes
            that differ.
    """
    if counts_E.dtype != torch.int64 or counts_E.shape != bias_E.shape:
        raise ValueError(
            f"counts_E: got {tuple(counts_E.shape)} {counts_E.dtype}, expected "
            f"{tuple(bias_E.shape)} torch.int64"
        )
    if bias_E.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"bias_E: got dtype {bias_E.dtype}, expected torch.float32")
    below_E = torch.sign(counts_E.sum(-1, keepdim=True) - counts_E * counts_E.shape[-1])
    bias_E.add_(below_E.to(bias_E), alpha=rate)
    return bias_E.sub_(bias_E.mean(-1, keepdim=True))


def drop_over_capacity(expert_ids_TK: torch.Tensor, capacity: int) -> torch.Tensor:
    """The ids with -1 where an expert already has ``capacity`` slots, given out in order of (token,
    slot).

    Count the load before this, not after: saturated experts look balanced.

    Raises:
        ValueError: a negative capacity.
    """
    if capacity < 0:
        raise ValueError(f"capacity: got {capacity}, expected at least 0")
    ids_N, slots_N = expert_ids_TK.reshape(-1).sort(stable=True)
    place_N = torch.arange(ids_N.numel(), device=ids_N.device) - torch.searchsorted(ids_N, ids_N)
    kept_N = torch.where(place_N < capacity, ids_N, -1)
    return torch.empty_like(kept_N).scatter_(0, slots_N, kept_N).view_as(expert_ids_TK)
