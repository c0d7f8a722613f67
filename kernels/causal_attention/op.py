"""The public causal attention: argument checks, then blocks on a CPU and PyTorch's fused attention
elsewhere.

B batch, L length, H heads, G heads of keys and values, P head width.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.causal_attention.cpu import causal_attention_cpu
from kernels.checks import check_devices, check_documents, check_floats, check_integers


def causal_attention(
    q_BLHP: Tensor,
    k_BLGP: Tensor,
    v_BLGP: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over the earlier tokens of the same document and the token itself.

    Deterministic for a fixed number of threads (CPU).

    Args:
        q_BLHP: (B, L, H, P), any float dtype.
        k_BLGP: (B, L, G, P), same dtype; each of its heads serves H / G heads of q, in order.
        v_BLGP: as k.
        seq_idx: (B, L) integers from 0, never decreasing along a row: the document of each token;
            tokens of different documents do not see one another. None for one document a row.

    Returns:
        (B, L, H, P) in the dtype of q.

    Raises:
        ValueError: shapes, dtypes, devices or document numbers that do not fit.
    """
    _check(q_BLHP, k_BLGP, v_BLGP, seq_idx)
    if q_BLHP.device.type == "cpu":
        return causal_attention_cpu(q_BLHP, k_BLGP, v_BLGP, seq_idx)
    q, k, v = (part.transpose(1, 2) for part in (q_BLHP, k_BLGP, v_BLGP))
    grouped = k.shape[1] != q.shape[1]
    if seq_idx is None:
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            enable_gqa=grouped,
        )
    else:
        visible = (seq_idx[:, None, :, None] == seq_idx[:, None, None, :]).tril()
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            enable_gqa=grouped,
        )
    return y.transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_idx: Tensor | None,
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q_BLHP: got {tuple(q.shape)}, expected (B, L, H, P)")
    check_floats(q_BLHP=q)
    batch, length, heads, width = q.shape
    groups = k.shape[2] if k.ndim == 4 else 0
    for name, part in (("k_BLGP", k), ("v_BLGP", v)):
        if tuple(part.shape) != (batch, length, groups, width) or part.dtype != q.dtype:
            wanted = f"{q.dtype} ({batch}, {length}, G, {width})"
            raise ValueError(
                f"{name}: got {part.dtype} {tuple(part.shape)}, expected {wanted}, the same G for "
                "k and v"
            )
    if groups < 1 or heads % groups:
        raise ValueError(
            f"k_BLGP: got {groups} heads, expected a divisor of the {heads} heads of q_BLHP"
        )
    if seq_idx is not None and tuple(seq_idx.shape) != (batch, length):
        raise ValueError(f"seq_idx: got {tuple(seq_idx.shape)}, expected ({batch}, {length})")
    check_integers(seq_idx=seq_idx)
    check_devices(
        q_BLHP=q,
        k_BLGP=k,
        v_BLGP=v,
        seq_idx=seq_idx,
    )
    check_documents(seq_idx)
