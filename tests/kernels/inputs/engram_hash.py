"""Hashes of the official code, its golden rows of a sentence, and small cases."""

import torch

from kernels.engram_hash import NgramHash, ngram_hashes

# Computed with the code of deepseek-ai/Engram (engram_demo_v1.py) for the V4 tokenizer, V' =
# 99,092, seed 0, pad 2.
VOCAB = 99_092
PAD = 2
DEMO = ngram_hashes(
    (1, 15),
    VOCAB,
    (2, 3),
    8,
    646_400,
    seed=0,
    pad_id=PAD,
)
V41 = ngram_hashes(
    (1, 14),
    VOCAB,
    (2, 3, 4),
    8,
    16_000_000,
    seed=0,
    pad_id=PAD,
)
# "Only Alexander the Great could tame the horse Bucephalus."
SENTENCE = [1134, 15695, 237, 2049, 1260, 85761, 237, 12071, 36, 9745, 20232, 290, 16]
FIRST = [
    417228,
    479277,
    11032,
    383138,
    46642,
    17954,
    102944,
    15908,
    1336,
    311707,
    83314,
    17558,
    239192,
    502156,
    402774,
    357036,
]
LAST = [
    464747,
    633777,
    601279,
    346799,
    420185,
    185224,
    38915,
    525798,
    294009,
    526490,
    611837,
    112419,
    58618,
    327076,
    364005,
    193850,
]


def small_hash(orders=(2, 3), num_heads=3, table_size=50, vocab_size=30, pad_id=0) -> NgramHash:
    """Hashes of one layer with tables of about fifty rows."""
    return ngram_hashes(
        (4,),
        vocab_size,
        orders,
        num_heads,
        table_size,
        seed=1,
        pad_id=pad_id,
    )[4]


def random_case(length=23, vocab_size=30, masked_every=0):
    """Two packed rows: ids, and documents of random lengths."""
    ids_BL = torch.randint(0, vocab_size, (2, length))
    if masked_every:
        ids_BL[torch.rand(2, length) < 1 / masked_every] = -1
    return ids_BL, (torch.rand(2, length) < 0.25).cumsum(1)
