"""The gate beside its plain formula: ``python -m kernels.engram_gate.bench`` tries launch options
on a card.

On a GPU it is bound by bytes. A token of S streams and D channels, the streams in fp32 and the rest
in bf16: forward reads 6 S D + 2 D and writes 2 S D; backward reads 8 S D + 2 D and writes 6 S D + 2
D. With the residual forward writes 4 S D and reads h a second time, at best from L2; backward reads
14 S D + 2 D, since both its kernels read du. Adding u in a pass of its own takes 10 S D forward,
and 18 S D backward: du is rounded to bf16, then added to dh.

Compiled for sm_90, S = 4 and D = 1,280, the three kernels take 80, 96 and 66 registers a thread:
24, 20 and 28 warps an SM, each thread with 48 to 80 bytes on their way in one round of loads. With
the residual the last takes 80: 24 warps.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.cases import SIZES, Case, Size, leaves
from kernels.engram_gate import engram_gate
from kernels.engram_gate.reference import engram_gate_reference

EPS = 1e-5


def draw(streams: int, width: int, tokens: int) -> list[Tensor]:
    """h, k, v and the norms' weights; keys lean towards h, or away from it, because the slope has a
    pole at score 0.
    """
    h_BLSD = torch.randn(1, tokens, streams, width)
    k_BLSD = torch.randn_like(h_BLSD) + h_BLSD * (
        torch.randint(0, 2, (1, tokens, streams, 1)) * 2 - 1
    )
    return [
        h_BLSD,
        k_BLSD,
        torch.randn(1, tokens, width),
        *(torch.rand(streams, width) + 0.5 for _ in range(2)),
    ]


def ours(
    h: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    backend: Backend | None = None,
    residual: bool = False,
) -> Tensor:
    """The gated values, or the streams with them."""
    return engram_gate(
        h,
        k,
        v,
        query_weight,
        key_weight,
        EPS,
        residual=residual,
        backend=backend,
    )


def plain(
    h: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    residual: bool = False,
) -> Tensor:
    """The formula in plain operations, under autograd."""
    return engram_gate_reference(
        h,
        k,
        v,
        query_weight,
        key_weight,
        EPS,
        residual=residual,
    )[0]


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """As the model calls it, with and without a convolution after it: streams in fp32, keys and
    values in 16 bits.
    """
    for streams, residual in product(sorted({1, size.streams}), (False, True)):
        yield _case(size, streams, residual, dtype)


def _case(
    size: Size,
    S: int,
    residual: bool,
    dtype: torch.dtype,
) -> Case:
    tokens = size.tokens
    D = size.d_model
    w = dtype.itemsize
    out = 4 if residual else w  # bytes of a value of the output, and of its gradient
    return Case(
        op="engram_gate",
        shapes=f"{size.name}: {tokens} x {S} x {D}{', residual' if residual else ''}",
        make=partial(_inputs, S, D),
        full=tokens,
        tiny=16,
        ours=partial(ours, residual=residual),
        exact=partial(plain, residual=residual),
        bytes_moved=(
            tokens * D * ((4 + w + out) * S + w),
            tokens * D * ((12 + 3 * w + 2 * out) * S + 3 * w),
        ),
        flops=((8 + residual) * tokens * S * D, (23 + 2 * residual) * tokens * S * D),
        dtype=dtype,
    )


def _inputs(
    streams: int,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    h_BLSD, k_BLSD, v_BLD, *weights = draw(streams, width, tokens)
    (h_BLSD,) = leaves(h_BLSD, dtype=torch.float32, device=device)
    k_BLSD, v_BLD = leaves(k_BLSD, v_BLD, dtype=dtype, device=device)
    return [h_BLSD, k_BLSD, v_BLD, *leaves(*weights, dtype=torch.float32, device=device)]


def sweep() -> None:
    """On a card: microseconds of the kernels alone, forward and backward, by values of a tile and
    warps.
    """
    from torch.utils.benchmark import Timer

    from kernels.engram_gate import triton

    for size, residual in product(SIZES, (False, True)):
        case = _case(size, size.streams, residual, torch.bfloat16)
        h, k, v, query_weight, key_weight = (
            x.detach() for x in case.make(case.full, case.dtype, "cuda")
        )
        u, scalars = triton.forward(
            h,
            k,
            v,
            query_weight,
            key_weight,
            EPS,
            None,
            residual,
        )
        # u has the shape and type of du.
        gradient = (
            u,
            h,
            k,
            v,
            query_weight,
            key_weight,
            None,
            scalars,
            residual,
        )
        for values in (512, 1024, 2048, 4096):
            for warps in (2, 4, 8):
                calls = (
                    partial(
                        triton.forward,
                        h,
                        k,
                        v,
                        query_weight,
                        key_weight,
                        EPS,
                        None,
                        residual,
                        values,
                        warps,
                    ),
                    partial(triton.backward, *gradient, values, warps),
                )
                times = [
                    1e6 * Timer("call()", globals={"call": call}).blocked_autorange().median
                    for call in calls
                ]
                print(
                    f"{case.shapes}: {values} values, {warps} warps: {times[0]:.0f} and "
                    f"{times[1]:.0f} us",
                    flush=True,
                )


if __name__ == "__main__":
    sweep()
