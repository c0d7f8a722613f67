"""Products over rows sorted by expert.

Weights lie as (E, in, out): gate_up (E, D, 2F) with gate in the first F columns, down (E, F, D). On
CPU the transposed layouts run at the same speed in all three products (within 5 % in bf16 and
fp32); this one reads like the formula.

Legend: M rows sorted by expert, D model width, E experts, F inner width.
Determinism: bitwise from run to run.
"""

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import check_floats
from kernels.grouped_matmul import cuda
from kernels.grouped_matmul.cpu import GroupedMatmul, GroupedMLP
from kernels.swiglu.cpu import swiglu, swiglu_backward

MAX_TRITON_EXPERTS = 4096  # the look-up of tiles holds a value an expert in registers


def grouped_matmul(
    x_MD: Tensor,
    weight_EDF: Tensor,
    counts_E: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """y_MF: the rows of each expert times its weight.

    The first counts_E[0] rows are expert 0's, the next counts_E[1] expert 1's, and so on. A card is
    not waited for: the counts stay there.

    Args:
        x_MD: rows sorted by expert; bf16, fp16, fp32 or fp64.
        weight_EDF: (E, D, F), same dtype.
        counts_E: int64, rows of each expert; they sum to M (checked where they are in host memory).
        backend: "torch" or "triton"; None for what suits the device: on a card `torch._grouped_mm`
            where it has a kernel, ours elsewhere.

    Raises:
        ValueError: shapes or dtypes that do not fit, or the backend cannot.
    """
    _check_rows(x_MD, counts_E)
    _check_weights(x_MD, counts_E, ("weight_EDF", weight_EDF, x_MD.shape[1], None))
    if use_triton(backend, x_MD, _unserved(counts_E)):
        ends_E = _ends(counts_E, x_MD)
        library = backend is None and x_MD.is_cuda
        return grouped_matmul_fwd(x_MD, weight_EDF, ends_E, library)
    return GroupedMatmul.apply(x_MD, weight_EDF, counts_E.tolist())


def grouped_mlp(
    x_MD: Tensor,
    counts_E: Tensor,
    gate_up_ED2F: Tensor,
    down_EFD: Tensor,
    activation: Literal["swiglu"] = "swiglu",
    backend: Backend | None = None,
) -> Tensor:
    """y_MD = (silu(x W_gate) * (x W_up)) W_down with the weights of each row's expert.

    SwiGLU, arXiv 2002.05202 eq. 6. The backward pass computes the activation again; x and the
    products with gate and up are kept for it.

    Args:
        x_MD: rows sorted by expert; bf16, fp16, fp32 or fp64.
        counts_E: int64, rows of each expert; they sum to M (checked where they are in host memory).
        gate_up_ED2F: (E, D, 2F), same dtype; gate is [..., :F], up is [..., F:].
        down_EFD: (E, F, D), same dtype.
        activation: "swiglu".
        backend: as in `grouped_matmul`.

    Raises:
        ValueError: an unknown activation, shapes or dtypes that do not fit, or the backend cannot.
    """
    if activation != "swiglu":
        raise ValueError(f"activation: got {activation!r}, expected 'swiglu'")
    _check_rows(x_MD, counts_E)
    width = x_MD.shape[1]
    inner = down_EFD.shape[1] if down_EFD.dim() == 3 else None
    _check_weights(
        x_MD,
        counts_E,
        ("gate_up_ED2F", gate_up_ED2F, width, inner and 2 * inner),
        ("down_EFD", down_EFD, inner, width),
    )
    if use_triton(backend, x_MD, _unserved(counts_E)):
        ends_E = _ends(counts_E, x_MD)
        library = backend is None and x_MD.is_cuda
        y_MD, _ = grouped_mlp_fwd(x_MD, gate_up_ED2F, down_EFD, ends_E, library)
        return y_MD
    return GroupedMLP.apply(
        x_MD,
        gate_up_ED2F,
        down_EFD,
        counts_E.tolist(),
    )


@torch.library.custom_op("engramba::grouped_matmul_fwd", mutates_args=())
def grouped_matmul_fwd(
    x_MD: Tensor,
    weight_EDF: Tensor,
    ends_E: Tensor,
    library: bool,
) -> Tensor:
    """y_MF of rows that end where ``ends_E`` says, the running sum of the counts in int32.

    With ``library``: by `torch._grouped_mm` where it has a kernel.
    """
    by = _products(library, x_MD, weight_EDF)
    rows = by.groups(x_MD, ends_E, weight_EDF)
    return by.product(x_MD, weight_EDF, rows)


@torch.library.custom_op("engramba::grouped_matmul_bwd", mutates_args=())
def grouped_matmul_bwd(
    dy_MF: Tensor,
    x_MD: Tensor,
    weight_EDF: Tensor,
    ends_E: Tensor,
    library: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights."""
    by = _products(library, x_MD, weight_EDF)
    rows = by.groups(x_MD, ends_E, weight_EDF)
    dx_MD = by.product(dy_MF, weight_EDF.mT, rows)
    dweight_EDF = by.weight_gradient(x_MD, dy_MF, rows)
    return dx_MD, dweight_EDF


@torch.library.custom_op("engramba::grouped_mlp_fwd", mutates_args=())
def grouped_mlp_fwd(
    x_MD: Tensor,
    gate_up_ED2F: Tensor,
    down_EFD: Tensor,
    ends_E: Tensor,
    library: bool,
) -> tuple[Tensor, Tensor]:
    """y_MD, and h_M2F, the inputs of the activation."""
    by = _products(library, x_MD, gate_up_ED2F, down_EFD)
    rows = by.groups(x_MD, ends_E, gate_up_ED2F, down_EFD)
    h_M2F = by.product(x_MD, gate_up_ED2F, rows)
    act_MF = _swiglu(h_M2F, library)
    y_MD = by.product(act_MF, down_EFD, rows)
    return y_MD, h_M2F


@torch.library.custom_op("engramba::grouped_mlp_bwd", mutates_args=())
def grouped_mlp_bwd(
    dy_MD: Tensor,
    x_MD: Tensor,
    h_M2F: Tensor,
    gate_up_ED2F: Tensor,
    down_EFD: Tensor,
    ends_E: Tensor,
    library: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up and down."""
    by = _products(library, x_MD, gate_up_ED2F, down_EFD)
    rows = by.groups(x_MD, ends_E, gate_up_ED2F, down_EFD)
    dact_MF = by.product(dy_MD, down_EFD.mT, rows)
    dh_M2F, act_MF = _swiglu_backward(h_M2F, dact_MF, library)
    del dact_MF  # its memory, and the activation's below, are wanted for what comes next
    ddown_EFD = by.weight_gradient(act_MF, dy_MD, rows)
    del act_MF
    dx_MD = by.product(dh_M2F, gate_up_ED2F.mT, rows)
    dgate_up_ED2F = by.weight_gradient(x_MD, dh_M2F, rows)
    return dx_MD, dgate_up_ED2F, ddown_EFD


@grouped_matmul_fwd.register_fake
def _(x_MD, weight_EDF, ends_E, library):
    return x_MD.new_empty(x_MD.shape[0], weight_EDF.shape[2])


@grouped_matmul_bwd.register_fake
def _(dy_MF, x_MD, weight_EDF, ends_E, library):
    return x_MD.new_empty(x_MD.shape), weight_EDF.new_empty(weight_EDF.shape)


@grouped_mlp_fwd.register_fake
def _(x_MD, gate_up_ED2F, down_EFD, ends_E, library):
    y_MD = x_MD.new_empty(x_MD.shape)
    h_M2F = x_MD.new_empty(x_MD.shape[0], gate_up_ED2F.shape[2])
    return y_MD, h_M2F


@grouped_mlp_bwd.register_fake
def _(dy_MD, x_MD, h_M2F, gate_up_ED2F, down_EFD, ends_E, library):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x_MD, gate_up_ED2F, down_EFD))


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.library = inputs
    ctx.save_for_backward(*tensors)


def _backward_matmul(ctx: Any, dy_MF: Tensor) -> tuple[Tensor | None, ...]:
    dx_MD, dweight_EDF = grouped_matmul_bwd(dy_MF, *ctx.saved_tensors, ctx.library)
    return dx_MD, dweight_EDF, None, None


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_MD, *weights_and_ends, ctx.library = inputs
    _, h_M2F = output
    ctx.save_for_backward(x_MD, h_M2F, *weights_and_ends)
    ctx.mark_non_differentiable(h_M2F)


def _backward_mlp(ctx: Any, dy_MD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *grouped_mlp_bwd(dy_MD, *ctx.saved_tensors, ctx.library), None, None


grouped_matmul_fwd.register_autograd(_backward_matmul, setup_context=_save_matmul)
grouped_mlp_fwd.register_autograd(_backward_mlp, setup_context=_save_mlp)


def _products(library: bool, x_MD: Tensor, *weights: Tensor) -> ModuleType:
    """Who multiplies: `groups`, `product` and `weight_gradient` of ``cuda`` or ``triton``.

    With ``library`` on CPU tensors, which only tests ask for, nothing of Triton's runs.
    """
    if library and cuda.takes(x_MD, *weights):
        return cuda
    from kernels.grouped_matmul import triton

    return triton


def _swiglu(h_M2F: Tensor, library: bool) -> Tensor:
    if library and not h_M2F.is_cuda:
        return swiglu(h_M2F)
    from kernels.swiglu import triton

    return triton.forward(h_M2F)


def _swiglu_backward(h_M2F: Tensor, dact_MF: Tensor, library: bool) -> tuple[Tensor, Tensor]:
    if library and not h_M2F.is_cuda:
        act_MF, dh_M2F = swiglu_backward(h_M2F, dact_MF)
        return dh_M2F, act_MF
    from kernels.swiglu import triton

    dh_M2F, act_MF = triton.backward(h_M2F, dact_MF, write_a=True)
    return dh_M2F, act_MF


def _unserved(counts_E: Tensor) -> str:
    num_experts = counts_E.numel()
    return f"{num_experts} experts" if num_experts > MAX_TRITON_EXPERTS else ""


def _ends(counts_E: Tensor, x_MD: Tensor) -> Tensor:
    return counts_E.to(x_MD.device).cumsum(0).to(torch.int32)


def _check_rows(x_MD: Tensor, counts_E: Tensor) -> None:
    if x_MD.dim() != 2:
        raise ValueError(f"x_MD: got {tuple(x_MD.shape)}, expected (M, D)")
    check_floats(x_MD=x_MD)
    if counts_E.dim() != 1 or counts_E.dtype != torch.int64:
        raise ValueError(
            f"counts_E: got {tuple(counts_E.shape)} {counts_E.dtype}, expected (E,) torch.int64"
        )
    if counts_E.device.type != "cpu" and counts_E.device != x_MD.device:
        raise ValueError(
            f"counts_E: got {counts_E.device}, expected host memory or {x_MD.device} as x_MD"
        )
    if counts_E.device.type != "cpu" or torch.compiler.is_compiling():
        return
    num_rows = x_MD.shape[0]
    negative = counts_E < 0
    if int(counts_E.sum()) != num_rows or bool(negative.any()):
        raise ValueError(
            f"counts_E: got {counts_E.tolist()}, expected counts that sum to the {num_rows} "
            "rows of x_MD"
        )


def _check_weights(
    x_MD: Tensor, counts_E: Tensor, *weights: tuple[str, Tensor, int | None, int | None]
) -> None:
    for name, weight, rows, columns in weights:
        expected = (counts_E.numel(), rows, columns)
        fits = weight.dim() == 3
        if fits:
            for got, want in zip(weight.shape, expected, strict=True):
                fits = fits and want in (None, got)
        if not fits or weight.dtype != x_MD.dtype or weight.device != x_MD.device:
            wanted = tuple("any" if size is None else size for size in expected)
            raise ValueError(
                f"{name}: got {tuple(weight.shape)} {weight.dtype} on {weight.device}, "
                f"expected {wanted} {x_MD.dtype} on {x_MD.device}"
            )
