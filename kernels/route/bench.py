"""Routing beside the plain formula: ``python -m kernels.route.bench`` sweeps on a card.

On a card small tensors cost launches, not bytes: forward reads and writes 4E bytes a token and
writes 12K, backward reads and writes 4E and reads 12K. The PyTorch path is about 15 launches
forward. Compiled for sm_90, 31 to 80 registers a thread (24 warps an SM and more).
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.cases import Case, Size, of_sizes, sweep_constants
from kernels.route.op import route


def first_weight(logits_TE: Tensor, bias_E: Tensor, top_k: int, scores: str) -> Tensor:
    """The first expert's weight: those of all sum to 1, so under a gradient of ones theirs would
    vanish.
    """
    return route(
        logits_TE,
        top_k,
        "sigmoid" if scores == "sigmoid" else "softmax",
        bias_E,
    )[1][:, 0]


def plain(logits_TE: Tensor, bias_E: Tensor, top_k: int, scores: str) -> Tensor:
    """As most models write it: the order of ties is left open."""
    scores_TE = logits_TE.sigmoid() if scores == "sigmoid" else logits_TE.softmax(-1)
    chosen_TK = scores_TE.gather(1, (scores_TE + bias_E).topk(top_k, -1).indices)
    return (chosen_TK / chosen_TK.sum(-1, keepdim=True))[:, 0]


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """Sigmoid and softmax scores, in fp32."""
    T = size.tokens
    E = size.experts
    top_k = size.top_k
    for scores in ("sigmoid", "softmax"):
        yield Case(
            op="route",
            shapes=f"{size.name}: {T} tokens, top-{top_k} of {E}, {scores}",
            make=partial(_logits, E),
            full=T,
            tiny=64,
            ours=partial(first_weight, top_k=top_k, scores=scores),
            exact=partial(plain, top_k=top_k, scores=scores),
            bytes_moved=(T * (8 * E + 12 * top_k), T * (16 * E + 24 * top_k)),
            flops=(10 * T * E, 14 * T * E),
            loose=1e-4,
            dtype=torch.float32,
        )


def _logits(E: int, T: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(T, E, device=device).requires_grad_(), 0.1 * torch.randn(E, device=device)]


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.route import triton

    sweep_constants(triton, of_sizes(cases), TILE=(512, 1024, 2048, 4096))


if __name__ == "__main__":
    sweep()
