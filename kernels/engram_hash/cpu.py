"""The hash as whole-tensor int64 arithmetic; device-neutral.

Shapes: B batch, L length, K ids of history, O n-gram orders x hash heads.
"""

import torch
from torch import Tensor

from kernels.engram_hash.layout import NgramHash


def _earlier(padded: Tensor, distance: int, length: int) -> Tensor:
    """What stood ``distance`` places before each of the last ``length`` places."""
    start = padded.shape[1] - length - distance
    return padded[:, start : start + length]


def _windows(
    ids_BL: Tensor,
    hash: NgramHash,
    seq_idx: Tensor | None,
    past_BK: Tensor,
) -> list[Tensor]:
    """The ids (B, L) at distance 0, 1, ... max_order - 1 before each position.

    ``pad_id`` stands where another document begins.
    """
    length = ids_BL.shape[1]
    padded = torch.cat([past_BK, ids_BL], dim=1)
    tokens = [_earlier(padded, distance, length) for distance in range(hash.max_order)]
    if seq_idx is None or not length:
        return tokens
    past_documents = seq_idx[:, :1].expand_as(past_BK)  # the past is of the first document
    documents = torch.cat([past_documents, seq_idx], dim=1)
    inside_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    for distance in range(1, hash.max_order):
        same_BL = _earlier(documents, distance, length) == seq_idx
        inside_BL = inside_BL & same_BL
        tokens[distance] = torch.where(inside_BL, tokens[distance], hash.pad_id)
    return tokens


def hash_rows(
    ids_BL: Tensor,
    hash: NgramHash,
    seq_idx: Tensor | None,
    past_BK: Tensor,
) -> Tensor:
    """Rows (B, L, O) int64 for checked int64 ids and a past of exactly ``max_order - 1`` ids.

    The mix rolls: ``mix_(n+1) = mix_n xor ids[t - n] * multipliers[n]``; all heads of an order
    share it and differ in the modulus only. Windows with a masked id are hashed too, and
    overwritten.
    """
    tokens = _windows(ids_BL, hash, seq_idx, past_BK)
    primes_of_order = dict(zip(hash.orders, hash.primes, strict=True))
    offsets_O = ids_BL.new_tensor(hash.offsets)
    first_column = 0
    mix_BL = torch.zeros_like(ids_BL)
    masked_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    columns = []
    for distance, token_BL in enumerate(tokens):
        mix_BL = mix_BL ^ (token_BL * hash.multipliers[distance])
        masked_BL = masked_BL | (token_BL < 0)
        order = distance + 1  # tokens in the window by now
        if order not in primes_of_order:
            continue
        primes = ids_BL.new_tensor(primes_of_order[order])
        end_column = first_column + len(primes)
        rows = mix_BL[..., None] % primes
        rows.add_(offsets_O[first_column:end_column])
        rows.masked_fill_(masked_BL[..., None], -1)
        columns.append(rows)
        first_column = end_column
    return torch.cat(columns, dim=-1)
