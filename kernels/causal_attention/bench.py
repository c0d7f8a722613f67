"""Causal attention beside PyTorch's fused attention, which knows no documents.

Bound by operations: 4 P a pair of positions and head forward, 10 P more backward, half of the pairs
being visible.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import Case, Size, documents, in_fp32, leaves
from kernels.causal_attention.op import causal_attention
from kernels.causal_attention.reference import causal_attention_reference


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's, with its causal flag."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        enable_gqa=True,
    ).transpose(1, 2)


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """Heads as wide as the model, those of keys and values a quarter of them, plain and packed."""
    P = size.head_dim
    tokens = size.tokens
    w = dtype.itemsize
    G = max(1, size.d_model // P // 4)
    H = 4 * G
    for packing in (False, True):
        pairs = tokens * size.length // 2 // (8 if packing else 1)
        yield Case(
            op="causal_attention",
            shapes=f"{size.name}: B{size.batch} L{size.length} H{H} of {G} "
            f"P{P}{', packed' if packing else ''}",
            make=partial(_heads, size, H, G, packing),
            full=tokens,
            tiny=70,
            ours=causal_attention,
            exact=in_fp32(causal_attention_reference),
            bytes_moved=(2 * w * tokens * P * (H + G), w * tokens * P * (6 * H + 6 * G)),
            flops=(4 * pairs * H * P, 14 * pairs * H * P),
            peers={} if packing else {"scaled_dot_product_attention": lambda: fused},
            cpu_peers={} if packing else {"scaled_dot_product_attention": lambda: fused},
            dtype=dtype,
        )


def _heads(
    size: Size,
    H: int,
    G: int,
    packing: bool,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    batch, length = size.rows(tokens)
    shapes = [(batch, length, heads, size.head_dim) for heads in (H, G, G)]
    inputs = leaves(*map(torch.randn, shapes), dtype=dtype, device=device)
    return [*inputs, documents(batch, length, device)] if packing else inputs
