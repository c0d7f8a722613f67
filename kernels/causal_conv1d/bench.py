"""causal_conv1d beside F.conv1d with groups: ``python -m kernels.causal_conv1d.bench`` tries launch
options on a card.

On a GPU the op is bound by bytes, in bf16 4 a token and channel forward and 6
backward, if the arithmetic keeps up. Instructions a value in the compiler's main loops for sm_90, 4
taps with SiLU: forward 13.6 (packed 19.7), backward 29.2 (34.8). An H200 issues 132 SMs x 4 warps x
32 lanes x 1.76 GHz = 29.7e12 a second, so at 4 TB/s these keep 46 % (66 %) and 66 % (78 %) of the
issue slots busy. Registers allow 32 warps an SM forward and 16 (packed 14) backward, at 8 x 256 and
4 x 2 x 256 bytes a warp: 64 and 32 (28) KiB on their way. The parts of the weight's gradient add 40
/ rows bytes a value, 5 % at walks of 128 rows, most of which stays within L2.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import MOE_3B, Case, Op, Size, documents, in_fp32, leaves
from kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.timing import print_table

K = 4
REQUESTS = 128  # decoded at a time


def peer(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    """PyTorch's grouped convolution, channels second,
    as the Mamba blocks of transformers use it.
    """
    y_BDL = F.conv1d(
        x_BLD.transpose(1, 2), weight_DK[:, None], bias_D, padding=K - 1, groups=len(weight_DK)
    )
    return F.silu(y_BDL[..., : x_BLD.shape[1]].transpose(1, 2))


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """Mamba-2's convolution, plain and packed, Engram's with dilation 3, and one decoding step of
    Mamba-2's.
    """
    tokens = size.tokens
    D = _width(size)
    w = dtype.itemsize
    for packing in (False, True):
        ids = 4 * tokens if packing else 0
        yield Case(
            op="causal_conv1d",
            shapes=f"{size.name}: {tokens} x {D}{', packed' if packing else ''}",
            make=partial(_projection, size, packing),
            full=tokens,
            tiny=64,
            ours=partial(_with_documents, partial(causal_conv1d, activation="silu")),
            exact=partial(_with_documents, partial(_exact, activation="silu")),
            bytes_moved=(2 * w * tokens * D + ids, 5 * w * tokens * D + 2 * ids),
            flops=((2 * K + 6) * tokens * D, (8 * K + 20) * tokens * D),
            peers={"causal_conv1d": _causal_conv1d_fn},
            cpu_peers={} if packing else {"F.conv1d + silu": lambda: peer},
            dtype=dtype,
        )
    if size.streams > 1:
        wide = size.streams * size.d_model
        yield Case(
            op="causal_conv1d",
            shapes=f"{size.name}: {tokens} x {wide}, dilation 3, packed (Engram)",
            make=partial(_engram, size, wide),
            full=tokens,
            tiny=192,
            ours=partial(_with_documents, partial(causal_conv1d, dilation=3)),
            exact=partial(_with_documents, partial(_exact, dilation=3)),
            bytes_moved=(tokens * (2 * w * wide + 4), tokens * (5 * w * wide + 8)),
            flops=(2 * K * tokens * wide, 6 * K * tokens * wide),
            dtype=dtype,
        )
    yield Case(
        op="causal_conv1d_step",
        shapes=f"{size.name}: {REQUESTS} x {D}, with a copy of the state",
        make=partial(_decoding, D),
        full=REQUESTS,
        tiny=2,
        ours=_step,
        exact=partial(_step, backend="torch"),
        reference=in_fp32(_plain_step),
        bytes_moved=(w * REQUESTS * D * (2 + 4 * (K - 1)),) * 2,
        flops=((2 * K + 6) * REQUESTS * D,) * 2,
        dtype=dtype,
    )


def _width(size: Size) -> int:
    return size.heads * size.head_dim + 2 * size.groups * size.state


def _with_documents(
    op: Op,
    x: Tensor,
    weight: Tensor,
    *rest: Tensor,
) -> Tensor:
    """``rest``: a bias if it is of floats, then document numbers."""
    bias = next((tensor for tensor in rest if tensor.is_floating_point()), None)
    seq_idx = next((tensor for tensor in rest if not tensor.is_floating_point()), None)
    return op(x, weight, bias, seq_idx)


def _exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The definition, its sums in fp32."""
    float_bias = None if bias is None else bias.float()
    return causal_conv1d_reference(
        x.float(),
        weight.float(),
        float_bias,
        seq_idx,
        **options,
    )[0].to(x.dtype)


def _causal_conv1d_fn() -> Op:
    """The peer: Dao-AILab's CUDA kernels."""
    from causal_conv1d import causal_conv1d_fn

    def peer_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        y: Tensor = causal_conv1d_fn(
            x.transpose(1, 2),
            weight,
            bias,
            seq_idx,
            activation="silu",
        )
        return y.transpose(1, 2)

    return partial(_with_documents, peer_fn)


def _step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    **options: Any,
) -> Tensor:
    return causal_conv1d_step(
        x,
        state.clone(),
        weight,
        bias,
        "silu",
        **options,
    )


def _plain_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    window_BKD = torch.cat([state, x[:, None]], 1)
    y_BD = (window_BKD * weight.t()).sum(1) + bias
    state.clone().copy_(window_BKD[:, 1:])
    return F.silu(y_BD)


def _projection(
    size: Size,
    packing: bool,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    """x as a view into Mamba-2's input projection [z | x, B, C | dt], weight, bias, and document
    numbers if packed.
    """
    (batch, length) = size.rows(tokens)
    D = _width(size)
    inner = size.heads * size.head_dim
    wide = torch.randn(
        batch,
        length,
        inner + D + size.heads,
        dtype=dtype,
        device=device,
    )
    inputs = [wide[..., inner : inner + D].requires_grad_()]
    inputs += leaves(
        torch.randn(D, K) / 2,
        torch.randn(D),
        dtype=dtype,
        device=device,
    )
    return [*inputs, documents(batch, length, device)] if packing else inputs


def _engram(
    size: Size,
    D: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    batch, length = size.rows(tokens)
    inputs = leaves(
        torch.randn(batch, length, D), torch.randn(D, K) / 2, dtype=dtype, device=device
    )
    return [*inputs, documents(batch, length, device)]


def _decoding(
    D: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    shapes = ((batch, D), (batch, K - 1, D), (D, K), (D,))
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def sweep() -> None:
    """Milliseconds of the forward and backward kernels on a card, for other rows, unrolling,
    channels and warps.
    """
    from triton.testing import do_bench

    from kernels.causal_conv1d import triton

    x, weight, bias, seq_idx = _projection(
        MOE_3B,
        True,
        MOE_3B.tokens,
        torch.bfloat16,
        "cuda",
    )
    dy = torch.randn_like(x)
    age = triton.forward(
        x,
        weight,
        bias,
        seq_idx,
        None,
        1,
        True,
        False,
    )[2]
    calls: dict[str, Callable[..., object]] = {
        "forward": lambda ids, tile: triton.forward(
            x, weight, bias, ids, None, 1, True, False, tile
        ),
        "backward": lambda ids, tile: triton.backward(
            dy, None, x, weight, bias, None if ids is None else age, None, 1, True, tile
        ),
    }
    rows = [["pass", "packed", "rows", "unroll", "channels", "warps", "ms"]]
    for name, ids in product(calls, (None, seq_idx)):
        timed = []
        for length, unroll, channels, warps in product(
            (32, 64, 128, 256), (2, 4, 8), (2, 4, 8), (1, 2, 4)
        ):
            tile = triton.Tile(
                rows=length,
                unroll=unroll,
                channels=channels,
                warps=warps,
            )
            taken = do_bench(partial(calls[name], ids, tile))
            timed.append(
                [taken, [name, str(ids is not None), *map(str, (length, unroll, channels, warps))]]
            )
        rows += [[*cells, f"{taken:.4f}"] for taken, cells in sorted(timed)[:8]]
    print_table(rows)


if __name__ == "__main__":
    sweep()
