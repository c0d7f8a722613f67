"""Checks and dispatch of the Engram hash.

Shapes: B batch, L length, K ids of history, O n-gram orders x hash heads.
"""

import torch
from torch import Tensor

from kernels.engram_hash.cpu import hash_rows
from kernels.engram_hash.layout import NgramHash


def _check_ids(name: str, ids: Tensor, batch: int, length: int, vocab_size: int) -> Tensor:
    """``ids`` as int64; ValueError when dtype, shape or range is wrong."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: got dtype {ids.dtype}, expected an integer dtype")
    if ids.shape != (batch, length):
        raise ValueError(f"{name}: got shape {tuple(ids.shape)}, expected {(batch, length)}")
    ids = ids.to(torch.int64)
    low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
    if low < -1 or high >= vocab_size:
        wrong = low if low < -1 else high
        raise ValueError(f"{name}: got id {wrong}, expected -1 (dead) to vocab_size - 1 = {vocab_size - 1}")
    return ids


def engram_hash(
    ids_BL: Tensor, hash: NgramHash, seq_idx: Tensor | None = None, history_BK: Tensor | None = None
) -> Tensor:
    """Table rows of every position's suffix n-grams (arXiv 2601.07372, section 2.2).

    For order n at position t: ``mix = xor over k < n of ids[t-k] * multipliers[k]``, and head h looks up row
    ``offset_h + mix mod prime_h``. Before the start of a row, and before the start of the position's document where
    ``seq_idx`` is given, ids count as ``hash.pad_id``. The result depends on the ids only: it is meant for the loader's
    side, and its range check waits for the device if ids live on one. Bitwise deterministic.

    Args:
        ids_BL: compressed ids, any integer dtype, 0 to vocab_size - 1; -1 is a dead position (an image, say).
        hash: the layer's functions, from :func:`ngram_hashes`.
        seq_idx: (B, L) integers, the document of each position; a document is a run of equal values.
        history_BK: the last max_order - 1 ids of position 0's document, for decoding and chunks of a long row;
            ``hash.pad_id`` where the document is younger. None: the row starts a document.

    Returns:
        (B, L, O) int64, O = orders x heads, order-major; rows count over the layer's one logical row space. -1 in every
        column whose window contains a dead position.

    Raises:
        ValueError: a shape, dtype or id is out of range.
    """
    if ids_BL.dim() != 2:
        raise ValueError(f"ids_BL: got shape {tuple(ids_BL.shape)}, expected two dims (B, L)")
    batch, length = ids_BL.shape
    ids_BL = _check_ids("ids_BL", ids_BL, batch, length, hash.vocab_size)
    if seq_idx is not None and seq_idx.shape != ids_BL.shape:
        raise ValueError(f"seq_idx: got shape {tuple(seq_idx.shape)}, expected {(batch, length)}")
    reach = hash.max_order - 1
    if history_BK is None:
        history_BK = ids_BL.new_full((batch, reach), hash.pad_id)
    past_BK = _check_ids("history_BK", history_BK, batch, reach, hash.vocab_size)
    return hash_rows(ids_BL, hash, seq_idx, past_BK)
