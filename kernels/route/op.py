"""Router scores, the choice of experts, and their weights (DeepSeek-V3, arXiv 2412.19437 section
2.1.2).

Legend: T tokens, E experts, K chosen experts.
Determinism: bitwise from run to run; of equal scores the lower expert wins, on every device.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import check_floats

MAX_TRITON_EXPERTS = 4096  # a row of experts is held in registers
MAX_TRITON_TOP_K = 64  # each choice is a pass over that row
MAX_PASSES = 8  # on a CPU; beyond it topk is faster


def route(
    logits_TE: Tensor,
    top_k: int,
    scores: Literal["sigmoid", "softmax"] = "sigmoid",
    bias_E: Tensor | None = None,
    route_scale: float = 1.0,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every expert, choose ``top_k`` by score plus bias, weigh the chosen by their unbiased
    scores.

    weights = route_scale * s / sum(s over the chosen); eq. 12 to 16. The bias decides who is chosen
    and nothing else.

    Args:
        logits_TE: fp32 (or fp64); 16-bit logits flip near ties, so they are refused.
        top_k: K, between 1 and E.
        scores: sigmoid (V3) or softmax over all experts.
        bias_E: fp32 balancing bias (`update_bias`); None for none.
        route_scale: factor on the normalised weights.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        expert_ids_TK int64 by falling biased score, weights_TK and scores_TE in the dtype of the
        logits, both differentiable in the logits.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit, or the backend cannot.
    """
    if logits_TE.dim() != 2 or logits_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logits_TE: got {tuple(logits_TE.shape)} {logits_TE.dtype}, expected fp32 or fp64 "
            "(T, E)"
        )
    if scores not in ("sigmoid", "softmax"):
        raise ValueError(f"scores: got {scores!r}, expected 'sigmoid' or 'softmax'")
    _check_choice(logits_TE, top_k, bias_E)
    if use_triton(backend, logits_TE, _unserved(logits_TE, top_k, bias_E)):
        bias_E = None if bias_E is None else bias_E.detach()
        weights_TK, scores_TE, expert_ids_TK = route_fwd(
            logits_TE, bias_E, top_k, scores, route_scale
        )
        return expert_ids_TK, weights_TK, scores_TE
    scores_TE = torch.sigmoid(logits_TE) if scores == "sigmoid" else torch.softmax(logits_TE, -1)
    expert_ids_TK = choose_experts(scores_TE, top_k, bias_E, "torch")
    chosen_TK = scores_TE.gather(1, expert_ids_TK)
    # All chosen sigmoids can underflow to zero; then every weight is zero.
    weights_TK = chosen_TK / (chosen_TK.sum(1, keepdim=True) + torch.finfo(chosen_TK.dtype).tiny)
    return expert_ids_TK, weights_TK if route_scale == 1.0 else route_scale * weights_TK, scores_TE


@torch.no_grad()
def choose_experts(
    scores_TE: Tensor, top_k: int, bias_E: Tensor | None = None, backend: Backend | None = None
) -> Tensor:
    """expert_ids_TK int64: the ``top_k`` experts of the largest score plus bias; of equal ones the
    lower expert.

    Compared in fp32. ``backend`` as in `route`.

    Raises:
        ValueError: the scores are not floating, ``top_k`` or the bias does not fit them, or the
            backend cannot.
    """
    _check_choice(scores_TE, top_k, bias_E)
    if use_triton(backend, scores_TE, _unserved(scores_TE, top_k, bias_E)):
        return choose_experts_fwd(scores_TE, bias_E, top_k)
    biased_TE = (scores_TE if bias_E is None else scores_TE + bias_E).float()
    return _by_passes(biased_TE, top_k) if top_k <= MAX_PASSES else _by_keys(biased_TE, top_k)


def _by_passes(scores_TE: Tensor, top_k: int) -> Tensor:
    """The largest, then the largest of the others: ``max`` finds the first of equal ones, topk
    leaves open which.
    """
    # Above what is taken, which is -inf.
    left_TE = scores_TE.clamp_min(torch.finfo(torch.float32).min)
    chosen: list[Tensor] = []
    for _ in range(top_k):
        if chosen:
            left_TE.scatter_(1, chosen[-1], -torch.inf)
        chosen.append(left_TE.max(1, keepdim=True).indices)
    return torch.cat(chosen, 1)


def _by_keys(scores_TE: Tensor, top_k: int) -> Tensor:
    """topk of distinct integers: an fp32's bits in an order that is that of the numbers, then the
    lower expert.
    """
    bits_TE = (scores_TE + 0.0).view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    keys_TE = ordered_TE.long() * 2**32 - torch.arange(scores_TE.shape[1], device=scores_TE.device)
    return keys_TE.topk(top_k, dim=1).indices


@torch.library.custom_op("engramba::route_fwd", mutates_args=())
def route_fwd(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, scores: str, route_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give weights_TK, scores_TE and expert_ids_TK."""
    from kernels.route import triton

    return triton.forward(
        logits_TE,
        bias_E,
        top_k,
        scores,
        route_scale,
    )


@torch.library.custom_op("engramba::route_bwd", mutates_args=())
def route_bwd(
    dweights_TK: Tensor | None,
    dscores_TE: Tensor | None,
    ids_TK: Tensor,
    scores_TE: Tensor,
    scores: str,
    route_scale: float,
) -> Tensor:
    """The gradient of the logits."""
    from kernels.route import triton

    return triton.backward(
        dweights_TK,
        dscores_TE,
        ids_TK,
        scores_TE,
        scores,
        route_scale,
    )


@torch.library.custom_op("engramba::choose_experts", mutates_args=())
def choose_experts_fwd(scores_TE: Tensor, bias_E: Tensor | None, top_k: int) -> Tensor:
    """Give expert_ids_TK, of the K best scores."""
    from kernels.route import triton

    return triton.forward(scores_TE, bias_E, top_k, "given", 1.0)[2]


@route_fwd.register_fake
def _(logits_TE, bias_E, top_k, scores, route_scale):
    shape = (logits_TE.shape[0], top_k)
    ids_TK = logits_TE.new_empty(shape, dtype=torch.int64)
    return logits_TE.new_empty(shape), logits_TE.new_empty(logits_TE.shape), ids_TK


@route_bwd.register_fake
def _(dweights_TK, dscores_TE, ids_TK, scores_TE, scores, route_scale):
    return scores_TE.new_empty(scores_TE.shape)


@choose_experts_fwd.register_fake
def _(scores_TE, bias_E, top_k):
    return scores_TE.new_empty((scores_TE.shape[0], top_k), dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, ctx.scores, ctx.route_scale = inputs
    _, scores_TE, ids_TK = output
    ctx.save_for_backward(ids_TK, scores_TE)
    ctx.mark_non_differentiable(ids_TK)
    ctx.set_materialize_grads(False)  # without auxiliary losses the scores have no gradient to read


def _backward(
    ctx: Any, dweights_TK: Tensor | None, dscores_TE: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if dweights_TK is None and dscores_TE is None:
        return None, None, None, None, None
    dlogits_TE = route_bwd(
        dweights_TK,
        dscores_TE,
        *ctx.saved_tensors,
        ctx.scores,
        ctx.route_scale,
    )
    return dlogits_TE, None, None, None, None


route_fwd.register_autograd(_backward, setup_context=_save)


def _check_choice(scores_TE: Tensor, top_k: int, bias_E: Tensor | None) -> None:
    if scores_TE.dim() != 2:
        raise ValueError(f"scores_TE: got {tuple(scores_TE.shape)}, expected (T, E)")
    check_floats(scores_TE=scores_TE)
    num_experts = scores_TE.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: got {top_k}, expected 1 to the {num_experts} experts")
    if bias_E is None:
        return
    if tuple(bias_E.shape) != (num_experts,) or bias_E.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"bias_E: got {tuple(bias_E.shape)} {bias_E.dtype}, expected ({num_experts},) float32"
        )
    if bias_E.device != scores_TE.device:
        raise ValueError(f"bias_E: got {bias_E.device}, expected {scores_TE.device}")


def _unserved(scores_TE: Tensor, top_k: int, bias_E: Tensor | None) -> str:
    if scores_TE.shape[1] > MAX_TRITON_EXPERTS:
        return f"{scores_TE.shape[1]} experts"
    if top_k > MAX_TRITON_TOP_K:
        return f"a top_k of {top_k}"
    return "" if bias_E is None or bias_E.dtype is torch.float32 else f"a bias of {bias_E.dtype}"
