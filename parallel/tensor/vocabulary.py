"""A vocabulary cut over tensor ranks: looking tokens up, their logits, and the cross-entropy.

B batch, L length, T = B x L tokens, D model width, V vocabulary (padded); each rank holds V / tp
rows of weight_VD, in order.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from parallel.collectives import gather_values, split_tokens, sum_to_replica
from parallel.mesh import Mesh

LOSS_CHUNK = 2048  # tokens whose logits exist at once


def look_up(
    ids_BL: torch.Tensor,
    weight_VD: torch.Tensor,
    mesh: Mesh,
) -> torch.Tensor:
    """x_BLD, the rows of all tokens, on every tensor rank; cut along L under sequence parallelism.

    Communicates over ``tp``: a sum, in which one rank's row meets zeros.
    """
    if mesh.size("tp") == 1:
        return F.embedding(ids_BL, weight_VD)
    group = mesh.group("tp")
    local_BL = ids_BL - first_row(weight_VD, mesh)
    is_elsewhere_BL = (local_BL < 0) | (local_BL >= weight_VD.shape[0])
    local_BL = local_BL.masked_fill(is_elsewhere_BL, 0)
    x_BLD = F.embedding(local_BL, weight_VD)
    x_BLD = x_BLD.masked_fill(is_elsewhere_BL[..., None], 0)
    x_BLD = sum_to_replica(x_BLD, group)
    if mesh.sequence_parallel:
        x_BLD = split_tokens(x_BLD, group)
    return x_BLD


def first_row(weight_VD: torch.Tensor, mesh: Mesh) -> int:
    """The token of this rank's first row."""
    return mesh.rank("tp") * weight_VD.shape[0]


def local_logits(
    h_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    mesh: Mesh,
    vocab_size: int,
) -> torch.Tensor:
    """Logits of this rank's tokens of the vocabulary, fp32; of padding the lowest number."""
    logits_TV = F.linear(h_TD, weight_VD).float()
    first = first_row(weight_VD, mesh)
    stop = first + weight_VD.shape[0]
    ids_V = torch.arange(first, stop, device=h_TD.device)
    is_padding_V = ids_V >= vocab_size
    lowest = torch.finfo(torch.float32).min
    return logits_TV.masked_fill(is_padding_V, lowest)


def gather_logits(local_BLV: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The logits of the whole vocabulary, on every tensor rank. Communicates over ``tp``."""
    if mesh.size("tp") == 1:
        return local_BLV  # without the copy that torch.cat makes of one
    return torch.cat(gather_values(local_BLV, mesh.group("tp")), -1)


def cross_entropy(
    h_TD: torch.Tensor,
    targets_T: torch.Tensor,
    weight_VD: torch.Tensor,
    mesh: Mesh,
    vocab_size: int,
    ignore: int,
) -> torch.Tensor:
    """Sum of the cross-entropies of all targets but ``ignore``, fp32, the same on all tensor ranks.

    Communicates over ``tp``. Logits of ``LOSS_CHUNK`` tokens exist at once: they are made again in
    the backward.
    """

    def chunk_loss(h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = local_logits(h, weight_VD, mesh, vocab_size)
        return _sum_of_losses(logits, targets, ignore)

    hidden_chunks = h_TD.split(LOSS_CHUNK)
    target_chunks = targets_T.split(LOSS_CHUNK)
    total = h_TD.new_zeros((), dtype=torch.float32)
    for h, targets in zip(hidden_chunks, target_chunks, strict=True):
        loss = checkpoint(
            chunk_loss,
            h,
            targets,
            use_reentrant=False,
        )
        total = total + loss
    return total


def _sum_of_losses(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    ignore: int,
) -> torch.Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    is_valid_T = targets_T != ignore
    any_target_T = targets_T.where(is_valid_T, 0)
    losses_T = vocab_parallel_cross_entropy(logits_TV, any_target_T)
    return (losses_T * is_valid_T).sum()


def merge_log_sums(stats_2T: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Log-sum-exp and target's logit of the whole vocabulary, from those of this rank's part.

    Communicates over ``tp``.
    """
    parts = gather_values(stats_2T, mesh.group("tp"))
    log_sums, logits = torch.stack(parts, 1)
    log_sum = log_sums.logsumexp(0)
    logit = logits.sum(0)
    return torch.stack((log_sum, logit))
