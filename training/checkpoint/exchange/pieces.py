"""Which rows of our tensors are which rows of another format's, block by block.

Another format packs what we keep by part (z, x, B, C, dt in one ``in_proj``), orders dims
otherwise, and knows no padding of the vocabulary. All of that is a list of ``Piece``s, which export
reads from left to right and import back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from training.model.config import ModelConfig, padded_vocab

# Tensors with this prefix go into a file of their own: what the other format has no place for.
BESIDE = "beside."

Fold = Literal["", "conv", "transpose"]


@dataclass(frozen=True)
class Piece:
    """``rows`` of dim 0 that two tensors share."""

    ours: str | None
    """A logical tensor; None for a constant that the other format needs and we do not."""
    theirs: str
    rows: int
    our_start: int = 0
    their_start: int = 0
    fold: Fold = ""
    """conv: (C, K) is (C, 1, K) there. transpose: (E, D, F) is (E, F, D) there."""
    inner: tuple[int, ...] = ()
    """Other dims of a constant."""
    fill: float = 0.0
    """The value of a piece that is constant."""


def fold_shape(shape: tuple[int, ...], fold: Fold) -> tuple[int, ...]:
    """Shape of ours as it is there."""
    if fold == "conv":
        return (shape[0], 1, shape[1])
    return (shape[0], shape[2], shape[1]) if fold == "transpose" else shape


def fold_values(values: torch.Tensor, fold: Fold) -> torch.Tensor:
    """Rows of ours as they are there."""
    if fold == "conv":
        return values.unsqueeze(1)
    return values.transpose(1, 2) if fold == "transpose" else values


def unfold_values(values: torch.Tensor, fold: Fold) -> torch.Tensor:
    """Rows of theirs as they are here."""
    if fold == "conv":
        return values.squeeze(1)
    return values.transpose(1, 2) if fold == "transpose" else values


def whole(ours: str, theirs: str, rows: int, fold: Fold = "") -> list[Piece]:
    """A parameter that is one tensor in both."""
    return [Piece("fp32/" + ours, theirs, rows, fold=fold)]


def packed(
    ours: str, theirs: str, parts: Sequence[tuple[str, int]], fold: Fold = ""
) -> list[Piece]:
    """A parameter that we keep by part (name, rows)."""
    pieces = []
    start = 0
    for part, rows in parts:
        pieces.append(
            Piece(
                f"fp32/{ours}.{part}",
                theirs,
                rows,
                their_start=start,
                fold=fold,
            )
        )
        start += rows
    return pieces


def vocabulary(model: ModelConfig, embedding: str, norm: str, head: str) -> list[Piece]:
    """Embedding, last norm and head; the rows that only pad our vocabulary go beside."""
    pieces = whole("norm", norm, model.d_model)
    size = model.vocab_size
    padded = padded_vocab(model)
    for ours, theirs in {"embedding.weight": embedding, "head.weight": head}.items():
        if ours == "embedding.weight" or not model.tie_embeddings:
            pieces += whole(ours, theirs, size)
            if padded > size:
                pieces.append(
                    Piece(
                        f"fp32/{ours}",
                        f"{BESIDE}padding.{ours}",
                        padded - size,
                        our_start=size,
                    )
                )
    return pieces


def mamba2(model: ModelConfig, ours: str, theirs: str) -> list[Piece]:
    """A Mamba-2 mixer, named as in transformers."""
    config = model.mamba2
    inner = config.expand * model.d_model
    bc = config.num_groups * config.state_dim
    heads = inner // config.head_dim
    conv = (("x", inner), ("B", bc), ("C", bc))
    return [
        *packed(
            f"{ours}.in_proj.weight",
            f"{theirs}.in_proj.weight",
            (("z", inner), *conv, ("dt", heads)),
        ),
        *packed(
            f"{ours}.conv_weight",
            f"{theirs}.conv1d.weight",
            conv,
            fold="conv",
        ),
        *packed(f"{ours}.conv_bias", f"{theirs}.conv1d.bias", conv),
        *whole(f"{ours}.A_log", f"{theirs}.A_log", heads),
        *whole(f"{ours}.D", f"{theirs}.D", heads),
        *whole(f"{ours}.dt_bias", f"{theirs}.dt_bias", heads),
        *whole(f"{ours}.norm_weight", f"{theirs}.norm.weight", inner),
        *whole(f"{ours}.out_proj.weight", f"{theirs}.out_proj.weight", model.d_model),
    ]


def mamba1(model: ModelConfig, ours: str, theirs: str) -> list[Piece]:
    """A Mamba-1 mixer, named as in transformers."""
    config = model.mamba1
    inner = config.expand * model.d_model
    rank = config.dt_rank or -(-model.d_model // 16)
    return [
        *packed(f"{ours}.in_proj.weight", f"{theirs}.in_proj.weight", (("x", inner), ("z", inner))),
        *whole(
            f"{ours}.conv_weight",
            f"{theirs}.conv1d.weight",
            inner,
            fold="conv",
        ),
        *whole(f"{ours}.conv_bias", f"{theirs}.conv1d.bias", inner),
        *whole(f"{ours}.x_proj.weight", f"{theirs}.x_proj.weight", rank + 2 * config.state_dim),
        *whole(f"{ours}.dt_proj", f"{theirs}.dt_proj.weight", inner),
        *whole(f"{ours}.dt_bias", f"{theirs}.dt_proj.bias", inner),
        *whole(f"{ours}.A_log", f"{theirs}.A_log", inner),
        *whole(f"{ours}.D", f"{theirs}.D", inner),
        *whole(f"{ours}.out_proj.weight", f"{theirs}.out_proj.weight", model.d_model),
    ]


def attention(model: ModelConfig, ours: str, theirs: str) -> list[Piece]:
    """Attention, with its projections one by one as in transformers."""
    config = model.attention
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    pieces = whole(f"{ours}.out_proj.weight", f"{theirs}.o_proj.weight", model.d_model)
    for part, count in heads.items():
        name = f"{theirs}.{part}_proj.weight"
        pieces += packed(f"{ours}.qkv.weight", name, ((part, count * config.head_dim),))
    return pieces


def swiglu(model: ModelConfig, ours: str, theirs: str, inner: int) -> list[Piece]:
    """A dense MLP, named as Granite's shared one."""
    gate_up = (("gate", inner), ("up", inner))
    return [
        *packed(f"{ours}.gate_up.weight", f"{theirs}.input_linear.weight", gate_up),
        *whole(f"{ours}.down.weight", f"{theirs}.output_linear.weight", model.d_model),
    ]
