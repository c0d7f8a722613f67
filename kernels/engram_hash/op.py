"""Checks and dispatch of the Engram hash, and the library op of its Triton kernel.

Shapes: B batch, L length, K ids of history, O n-gram orders x hash heads, Y layers.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import check_devices, check_documents, check_integers
from kernels.engram_hash.cpu import hash_rows
from kernels.engram_hash.layout import NgramHash

MAX_COLUMNS = 256  # a block of positions with all their columns is held in registers


def engram_hash(
    ids_BL: Tensor,
    hash: NgramHash,
    seq_idx: Tensor | None = None,
    history_BK: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Table rows of every position's suffix n-grams (arXiv 2601.07372, section 2.2).

    For order n at position t: ``mix = xor over k < n of ids[t-k] * multipliers[k]``, and head h
    looks up row ``offset_h + mix mod prime_h``. Before the start of a row, and before the start of
    the position's document where ``seq_idx`` is given, ids count as ``hash.pad_id``. The result
    depends on the ids only: it is meant for the loader's side. Bitwise deterministic, and the same
    on every device.

    Args:
        ids_BL: compressed ids, any integer dtype, 0 to vocab_size - 1; -1 is a masked position (an
            image, say).
        hash: the layer's functions, from :func:`ngram_hashes`.
        seq_idx: (B, L) integers from 0, never decreasing along a row: the document of each
            position.
        history_BK: the last max_order - 1 ids of position 0's document, for decoding and chunks of
            a long row; ``hash.pad_id`` where the document is younger. None: the row starts a
            document.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        (B, L, O) int64, O = orders x heads, order-major; rows count over the layer's one logical
        row space. -1 in every column whose window contains a masked position.

    Raises:
        ValueError: a shape, dtype, device or id is out of range, or the backend cannot. Ids are
            looked at on CPUs only: on a GPU that would wait for it. There a wrong id gives a row
            inside the tables, or -1 if it is negative.
    """
    return engram_hash_layers(
        ids_BL,
        [hash],
        seq_idx,
        history_BK,
        backend,
    )[0]


def engram_hash_layers(
    ids_BL: Tensor,
    hashes: Sequence[NgramHash],
    seq_idx: Tensor | None = None,
    history_BK: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """:func:`engram_hash` of several layers of one model: one check of the ids, and one launch on a
    GPU.

    Args:
        hashes: of layers that differ in multipliers and primes only, as :func:`ngram_hashes` gives
            them.

    Returns:
        (Y, B, L, O) int64.

    Raises:
        ValueError: as :func:`engram_hash`, or the hashes do not fit together.
    """
    first = _check_hashes(hashes)
    if ids_BL.dim() != 2:
        raise ValueError(f"ids_BL: got shape {tuple(ids_BL.shape)}, expected two dims (B, L)")
    batch, length = ids_BL.shape
    _check_ids(
        "ids_BL",
        ids_BL,
        batch,
        length,
        first.vocab_size,
    )
    if seq_idx is not None:
        _check_shape("seq_idx", seq_idx, (batch, length))
    if history_BK is not None:
        _check_ids(
            "history_BK",
            history_BK,
            batch,
            first.max_order - 1,
            first.vocab_size,
        )
    check_integers(seq_idx=seq_idx)
    check_devices(ids_BL=ids_BL, seq_idx=seq_idx, history_BK=history_BK)
    check_documents(seq_idx)
    orders = list(first.orders)
    heads = _heads(first)
    many = f"{sum(heads)} columns" if sum(heads) > MAX_COLUMNS else ""
    if use_triton(backend, ids_BL, many):
        multipliers = [factor for hash in hashes for factor in hash.multipliers]
        primes = [prime for hash in hashes for prime in chain(*hash.primes)]
        return engram_hash_fwd(
            ids_BL, seq_idx, history_BK, orders, heads, multipliers, primes, first.pad_id
        )
    ids_BL = ids_BL.to(torch.int64)
    if history_BK is None:
        history_BK = ids_BL.new_full((batch, first.max_order - 1), first.pad_id)
    past_BK = history_BK.to(torch.int64)
    if len(hashes) == 1:
        return hash_rows(ids_BL, first, seq_idx, past_BK)[None]
    return torch.stack([hash_rows(ids_BL, hash, seq_idx, past_BK) for hash in hashes])


def _check_hashes(hashes: Sequence[NgramHash]) -> NgramHash:
    """The first of them, if the others have the same columns."""
    if not hashes:
        raise ValueError("hashes: got none, expected at least one")
    expected = _shared(hashes[0])
    for hash in hashes[1:]:
        for name, got in _shared(hash).items():
            if got != expected[name]:
                raise ValueError(
                    f"hashes: got {name} of {got} beside {expected[name]}, expected one for all "
                    "layers"
                )
    return hashes[0]


def _shared(hash: NgramHash) -> dict[str, object]:
    """What all layers of a launch have in common."""
    return {
        "orders": hash.orders,
        "heads": _heads(hash),
        "vocab_size": hash.vocab_size,
        "pad_id": hash.pad_id,
    }


def _heads(hash: NgramHash) -> list[int]:
    """Number of heads of each order."""
    return [len(primes) for primes in hash.primes]


def _check_ids(
    name: str,
    ids: Tensor,
    batch: int,
    length: int,
    vocab_size: int,
) -> None:
    """ValueError when dtype, shape or, on a CPU, range is wrong."""
    _check_shape(name, ids, (batch, length))
    check_integers(**{name: ids})
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in ids.to(torch.int64).aminmax())
    if low < -1 or high >= vocab_size:
        wrong = low if low < -1 else high
        raise ValueError(
            f"{name}: got id {wrong}, expected -1 (masked) to vocab_size - 1 = {vocab_size - 1}"
        )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")


@torch.library.custom_op("engramba::engram_hash_fwd", mutates_args=())
def engram_hash_fwd(
    ids: Tensor,
    seq_idx: Tensor | None,
    history: Tensor | None,
    orders: Sequence[int],
    heads: Sequence[int],
    multipliers: Sequence[int],
    primes: Sequence[int],
    pad_id: int,
) -> Tensor:
    """Rows (Y, B, L, O) of ids (B, L), without a gradient; multipliers are (Y, N) and primes (Y,
    O), flat.
    """
    from kernels.engram_hash import triton

    return triton.forward(
        ids,
        seq_idx,
        history,
        orders,
        heads,
        multipliers,
        primes,
        pad_id,
    )


@engram_hash_fwd.register_fake
def _(ids, seq_idx, history, orders, heads, multipliers, primes, pad_id):
    layers = len(multipliers) // max(orders)
    return ids.new_empty((layers, *ids.shape, sum(heads)), dtype=torch.int64)
