"""Fast depthwise causal convolution: in-place multiply-adds over shifted slices, in blocks that
stay in cache.

A block of rows is cast to fp32 once, goes through all taps and the activation, and is written back;
the backward recomputes it, so that only the inputs are saved. Blocks of about 2^17 values (512 KiB
of fp32) were the best of 2^14 to 2^20 on a CPU with 1 MiB of L2 a core: in fp32 the forward takes a
third of the time of one whole-tensor block.

Documents: only the first Z tokens of a document (its head) have taps that would cross a boundary.
Heads read nothing but heads, so they are gathered into one short row, convolved there with masks,
and written over the unmasked result.

Legend: B batch, L length, D channels, K taps, Q rows of a block, R tokens of all heads, Z = (K - 1)
* dilation inputs before the row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.causal_conv1d.reference import document_runs

BLOCK_VALUES = 1 << 17


@dataclass(frozen=True)
class Filter:
    """The constant part of one convolution, in the dtype of the sums."""

    weight_KD: Tensor
    bias_D: Tensor | None
    dilation: int
    silu: bool

    @property
    def halo(self) -> int:
        """Z, how many inputs before a token its oldest tap reaches."""
        return (self.weight_KD.shape[0] - 1) * self.dilation

    def apply(self, x_BQD: Tensor, same_KQ1: Tensor | None = None) -> Tensor:
        """Pre-activations of a block of inputs that starts Z early; ``same_KQ1`` switches single
        taps off.
        """
        rows = x_BQD.shape[1] - self.halo
        bias = self.weight_KD.new_zeros(()) if self.bias_D is None else self.bias_D
        acc_BQD = torch.addcmul(bias, x_BQD[:, self.halo :], self.weight_KD[-1])
        for k, start in enumerate(range(0, self.halo, self.dilation)):
            tap_BQD = x_BQD[:, start : start + rows]
            acc_BQD.addcmul_(
                tap_BQD if same_KQ1 is None else tap_BQD * same_KQ1[k], self.weight_KD[k]
            )
        return acc_BQD

    def transpose(
        self,
        dpre_BQD: Tensor,
        x_BQD: Tensor,
        dw_KD: Tensor,
        same_KQ1: Tensor | None = None,
    ) -> Tensor:
        """The adjoint of ``apply``: adds to ``dw_KD``, returns the gradient of x_BQD (which starts
        Z early).
        """
        rows = dpre_BQD.shape[1]
        dx_BQD = torch.zeros_like(x_BQD)
        product_BQD = torch.empty_like(dpre_BQD)
        for k, start in enumerate(range(0, self.halo + 1, self.dilation)):
            masked_BQD = dpre_BQD if same_KQ1 is None else dpre_BQD * same_KQ1[k]
            dx_BQD[:, start : start + rows].addcmul_(masked_BQD, self.weight_KD[k])
            torch.mul(masked_BQD, x_BQD[:, start : start + rows], out=product_BQD)
            dw_KD[k] += product_BQD.sum((0, 1))
        return dx_BQD

    def activate_(self, pre: Tensor) -> Tensor:
        """Apply the activation to its input, in place."""
        return F.silu(pre, inplace=True) if self.silu else pre

    def activation_backward(self, dy: Tensor, pre: Tensor) -> Tensor:
        """The gradient of what went into the activation."""
        return torch.ops.aten.silu_backward(dy, pre) if self.silu else dy


@dataclass(frozen=True)
class Heads:
    """The tokens whose taps would cross into an earlier document, as one row: where they are, which
    taps they keep.
    """

    batch_R: Tensor
    time_R: Tensor
    same_KR1: Tensor
    is_head_BL1: Tensor

    @classmethod
    def find(
        cls,
        run_BL: Tensor,
        taps: int,
        dilation: int,
    ) -> "Heads | None":
        """Heads of documents that begin inside the row; None when there are none."""
        halo = (taps - 1) * dilation
        L = run_BL.shape[1]
        is_head_BL = F.pad(run_BL, (halo, 0))[:, :L] != run_BL
        batch_R, time_R = is_head_BL.nonzero(as_tuple=True)
        if not len(batch_R):
            return None
        document_R = batch_R * (L + 1) + run_BL[batch_R, time_R]
        padded = F.pad(document_R, (halo, 0), value=-1)
        same_KR = (
            torch.stack(
                [padded[k * dilation : k * dilation + len(document_R)] for k in range(taps)]
            )
            == document_R
        )
        return cls(
            batch_R,
            time_R,
            same_KR[..., None],
            is_head_BL[..., None],
        )

    def gather(
        self,
        x_BLD: Tensor,
        halo: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The heads' inputs as a block (1, Z + R, D)."""
        return F.pad(x_BLD[self.batch_R, self.time_R].to(dtype), (0, 0, halo, 0))[None]


def input_block(
    x_BLD: Tensor,
    before_BZD: Tensor,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Inputs start - Z .. stop, in ``dtype``; a view where nothing has to be converted or
    joined.
    """
    halo = before_BZD.shape[1]
    if start >= halo:
        return x_BLD[:, start - halo : stop].to(dtype)
    return torch.cat((before_BZD[:, start:].to(dtype), x_BLD[:, :stop].to(dtype)), 1)


def block_rows(x_BLD: Tensor) -> int:
    """Rows of a block: what fits the cache of a CPU, the whole row elsewhere."""
    B, L, D = x_BLD.shape
    return max(16, BLOCK_VALUES // max(1, B * D)) if x_BLD.device.type == "cpu" else max(1, L)


class CausalConv1d(torch.autograd.Function):
    """y (B, L, D) of x, taps and the inputs before the row; saves nothing but its inputs."""

    @staticmethod
    def forward(
        ctx,
        x_BLD,
        weight_DK,
        bias_D,
        before_BZD,
        run_BL,
        dilation: int,
        silu: bool,
    ):  # type: ignore[override]
        filter_ = make_filter(x_BLD, weight_DK, bias_D, dilation, silu)
        dtype = filter_.weight_KD.dtype
        (B, L, D) = x_BLD.shape
        Q = block_rows(x_BLD)
        y_BLD = torch.empty((B, L, D), dtype=x_BLD.dtype, device=x_BLD.device)
        for start in range(0, L, Q):
            x_BQD = input_block(
                x_BLD,
                before_BZD,
                start,
                min(start + Q, L),
                dtype,
            )
            y_BLD[:, start : start + Q] = filter_.activate_(filter_.apply(x_BQD))
        heads = None if run_BL is None else Heads.find(run_BL, weight_DK.shape[1], dilation)
        if heads is not None:
            x_BRD = heads.gather(x_BLD, filter_.halo, dtype)
            y_1RD = filter_.activate_(filter_.apply(x_BRD, heads.same_KR1))
            y_BLD[heads.batch_R, heads.time_R] = y_1RD[0].to(y_BLD.dtype)
        ctx.save_for_backward(x_BLD, weight_DK, bias_D, before_BZD)
        ctx.heads = heads
        ctx.dilation = dilation
        ctx.silu = silu
        return y_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BLD):  # type: ignore[override]
        x_BLD, weight_DK, bias_D, before_BZD = ctx.saved_tensors
        filter_ = make_filter(
            x_BLD,
            weight_DK,
            bias_D,
            ctx.dilation,
            ctx.silu,
        )
        heads = ctx.heads
        dw_KD = torch.zeros_like(filter_.weight_KD)
        db_D = torch.zeros_like(filter_.weight_KD[0])
        dx_BLD, dbefore_BZD = backward_rows(
            filter_,
            heads,
            x_BLD,
            before_BZD,
            dy_BLD,
            dw_KD,
            db_D,
        )
        if heads is not None:
            dhead_RD = backward_heads(filter_, heads, x_BLD, dy_BLD, dw_KD, db_D)
            dx_BLD[heads.batch_R, heads.time_R] += dhead_RD.to(dx_BLD.dtype)
        dbias = None if bias_D is None else db_D.to(bias_D.dtype)
        return dx_BLD, dw_KD.t().to(weight_DK.dtype), dbias, dbefore_BZD, None, None, None


def make_filter(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    dilation: int,
    silu: bool,
) -> Filter:
    """Taps and bias in the dtype of the sums: fp32, or fp64 for fp64 inputs."""
    dtype = torch.promote_types(x_BLD.dtype, torch.float32)
    bias = None if bias_D is None else bias_D.to(dtype)
    return Filter(
        weight_DK.to(dtype).t().contiguous(),
        bias,
        dilation,
        silu,
    )


def backward_rows(
    filter_: Filter,
    heads: Heads | None,
    x_BLD: Tensor,
    before_BZD: Tensor,
    dy_BLD: Tensor,
    dw_KD: Tensor,
    db_D: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients through every token that is no head; a block hands the last Z rows of its dx to the
    next one.
    """
    dtype = dw_KD.dtype
    (B, L, D) = x_BLD.shape
    Q = block_rows(x_BLD)
    halo = filter_.halo
    dpadded = torch.empty((B, halo + L, D), dtype=x_BLD.dtype, device=x_BLD.device)
    carry_BZD = torch.zeros((B, halo, D), dtype=dtype, device=x_BLD.device)
    for start in range(0, L, Q):
        stop = min(start + Q, L)
        x_BQD = input_block(x_BLD, before_BZD, start, stop, dtype)
        dy_BQD = dy_BLD[:, start:stop].to(dtype)
        dpre_BQD = (
            filter_.activation_backward(dy_BQD, filter_.apply(x_BQD)) if filter_.silu else dy_BQD
        )
        if heads is not None:
            dpre_BQD = dpre_BQD.masked_fill(heads.is_head_BL1[:, start:stop], 0)
        db_D += dpre_BQD.sum((0, 1))
        dx_BQD = filter_.transpose(dpre_BQD, x_BQD, dw_KD)
        dx_BQD[:, :halo] += carry_BZD
        dpadded[:, start:stop] = dx_BQD[:, : stop - start]
        carry_BZD = dx_BQD[:, stop - start :]
    dpadded[:, L:] = carry_BZD
    return dpadded[:, halo:], dpadded[:, :halo]


def backward_heads(
    filter_: Filter,
    heads: Heads,
    x_BLD: Tensor,
    dy_BLD: Tensor,
    dw_KD: Tensor,
    db_D: Tensor,
) -> Tensor:
    """Gradient of the heads' own inputs (R, D) through the heads' outputs; adds to dw and db."""
    x_1RD = heads.gather(x_BLD, filter_.halo, dw_KD.dtype)
    dy_1RD = dy_BLD[heads.batch_R, heads.time_R].to(dw_KD.dtype)[None]
    dpre_1RD = filter_.activation_backward(dy_1RD, filter_.apply(x_1RD, heads.same_KR1))
    db_D += dpre_1RD.sum((0, 1))
    return filter_.transpose(dpre_1RD, x_1RD, dw_KD, heads.same_KR1)[0, filter_.halo :]


def final_states(x_BLD: Tensor, before_BZD: Tensor, run_BL: Tensor | None) -> Tensor:
    """The last Z inputs, zero where they belong to an earlier document than the last token;
    differentiable.
    """
    halo = before_BZD.shape[1]
    L = x_BLD.shape[1]
    kept = min(halo, L)
    state_BZD = torch.cat((before_BZD[:, kept:].to(x_BLD.dtype), x_BLD[:, L - kept :]), 1)
    if run_BL is None or L == 0:
        return state_BZD
    padded_run = F.pad(run_BL, (halo, 0))[:, L:]
    return state_BZD.masked_fill((padded_run != run_BL[:, -1:])[..., None], 0)


def causal_conv1d_cpu(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    seq_idx_BL: Tensor | None,
    initial_states_BZD: Tensor | None,
    silu: bool,
    dilation: int,
    return_final_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """``causal_conv1d`` for checked arguments: y (B, L, D), and the final states (B, Z, D) if asked
    for.
    """
    B, _, D = x_BLD.shape
    before_BZD = initial_states_BZD
    if before_BZD is None:
        before_BZD = x_BLD.new_zeros(B, (weight_DK.shape[1] - 1) * dilation, D)
    run_BL = None if seq_idx_BL is None else document_runs(seq_idx_BL, x_BLD)
    y_BLD = CausalConv1d.apply(
        x_BLD,
        weight_DK,
        bias_D,
        before_BZD,
        run_BL,
        dilation,
        silu,
    )
    return y_BLD, final_states(x_BLD, before_BZD, run_BL) if return_final_states else None
