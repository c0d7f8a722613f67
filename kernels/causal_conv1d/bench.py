"""causal_conv1d with SiLU beside nn.functional.conv1d with groups: ``python -m kernels.causal_conv1d.bench``.

``sweep`` tries launch options on a card. On a GPU the op is bound by bytes, in bf16 4 a token and channel forward and 6
backward, if the arithmetic keeps up. Instructions a value in the compiler's main loops for sm_90, 4 taps with SiLU:
forward 13.6 (packed 19.7), backward 29.2 (34.8). An H200 issues 132 SMs x 4 warps x 32 lanes x 1.76 GHz = 29.7e12 a
second, so at 4 TB/s these keep 46 % (66 %) and 66 % (78 %) of the issue slots busy. Registers allow 32 warps an SM
forward and 16 (packed 14) backward, at 8 x 256 and 4 x 2 x 256 bytes a warp: 64 and 32 (28) KiB on their way. The parts
of the weight's gradient add 40 / rows bytes a value, 5 % at walks of 128 rows, most of which stays within L2.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import MOE_3B, SIZES, Case, Op, Size, documents, leaves
from kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.timing import Row, compare, machine, print_rows, print_table, relative_error

B, L, D, K = 4, 512, 640, 4
REQUESTS = 128  # decoded at a time


def ours(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    """One document a row."""
    return causal_conv1d(x_BLD, weight_DK, bias_D, activation="silu")


def packed(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    """Six documents a row, which the peer cannot tell apart."""
    seq_idx_BL = (torch.arange(L) // 100).int().expand(B, L)
    return causal_conv1d(x_BLD, weight_DK, bias_D, seq_idx_BL, activation="silu")


def peer(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    """PyTorch's grouped convolution, channels second, as the Mamba blocks of transformers use it."""
    y_BDL = F.conv1d(x_BLD.transpose(1, 2), weight_DK[:, None], bias_D, padding=K - 1, groups=len(weight_DK))
    return F.silu(y_BDL[..., : x_BLD.shape[1]].transpose(1, 2))


def measure() -> list[Row]:
    """bf16 and fp32; x is a slice of a wider tensor, as in the model."""
    rows = []
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        wide = torch.randn(B, L, 2 * D, dtype=dtype)
        inputs = [x.requires_grad_() for x in (wide[..., D:], torch.randn(D, K).to(dtype), torch.randn(D).to(dtype))]
        peers, case = {"F.conv1d + silu": peer}, f"{B} x {L} x {D}, {str(dtype)[6:]}"
        whole = compare("causal_conv1d", case, ours, peers, inputs, limit=limit)
        with torch.no_grad():
            first = [packed(*inputs)[:, :100], ours(*inputs)[:, :100]]
        error = max(whole[0].error, relative_error(first[:1], first[1:]))
        rows += [*whole, *compare("causal_conv1d", f"{case}, packed", packed, peers, inputs, limit=limit, error=error)]
    return rows


def gpu_cases() -> Iterator[Case]:
    """Mamba-2's convolution, plain and packed, Engram's with dilation 3, and one decoding step of Mamba-2's."""
    for size in SIZES:
        for packing in (False, True):
            yield _mamba(size, packing)
    tokens, D = MOE_3B.batch * MOE_3B.length, MOE_3B.streams * MOE_3B.d_model
    yield Case(
        op="causal_conv1d",
        shapes=f"{MOE_3B.name}: {tokens} x {D}, dilation 3, packed (Engram)",
        make=partial(_engram, MOE_3B.batch, D),
        full=MOE_3B.length,
        tiny=192,
        ours=partial(_with_documents, partial(causal_conv1d, dilation=3)),
        exact=partial(_with_documents, partial(_exact, dilation=3)),
        bytes_moved=(tokens * (4 * D + 4), tokens * (10 * D + 8)),
        flops=(2 * K * tokens * D, 6 * K * tokens * D),
    )
    for size in SIZES:
        D = _width(size)
        yield Case(
            op="causal_conv1d_step",
            shapes=f"{size.name}: {REQUESTS} x {D}, with a copy of the state",
            make=partial(_decoding, D),
            full=REQUESTS,
            tiny=2,
            ours=_step,
            exact=partial(_step, backend="torch"),
            bytes_moved=(REQUESTS * D * 2 * (2 + 4 * (K - 1)),) * 2,
            flops=((2 * K + 6) * REQUESTS * D,) * 2,
        )


def _mamba(size: Size, packing: bool) -> Case:
    tokens, D = size.batch * size.length, _width(size)
    ours_, exact = partial(causal_conv1d, activation="silu"), partial(_exact, activation="silu")
    ids = 4 * tokens if packing else 0
    return Case(
        op="causal_conv1d",
        shapes=f"{size.name}: {tokens} x {D}{', packed' if packing else ''}",
        make=partial(_projection, size, packing),
        full=size.length,
        tiny=64,
        ours=partial(_with_documents, ours_),
        exact=partial(_with_documents, exact),
        bytes_moved=(4 * tokens * D + ids, 10 * tokens * D + 2 * ids),
        flops=((2 * K + 6) * tokens * D, (8 * K + 20) * tokens * D),
        peers={"causal_conv1d": _causal_conv1d_fn},
    )


def _width(size: Size) -> int:
    return size.heads * size.head_dim + 2 * size.groups * size.state


def _with_documents(op: Op, x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    """``rest``: a bias if it is of floats, then document numbers."""
    bias = next((tensor for tensor in rest if tensor.is_floating_point()), None)
    seq_idx = next((tensor for tensor in rest if not tensor.is_floating_point()), None)
    return op(x, weight, bias, seq_idx)


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None, **options: object) -> Tensor:
    """The definition, its sums in fp32."""
    float_bias = None if bias is None else bias.float()
    return causal_conv1d_reference(x.float(), weight.float(), float_bias, seq_idx, **options)[0].to(x.dtype)  # type: ignore[arg-type]


def _causal_conv1d_fn() -> Op:
    """Dao-AILab's CUDA kernels."""
    from causal_conv1d import causal_conv1d_fn

    def peer_fn(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        y: Tensor = causal_conv1d_fn(x.transpose(1, 2), weight, bias, seq_idx, activation="silu")
        return y.transpose(1, 2)

    return partial(_with_documents, peer_fn)


def _step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, **options: object) -> Tensor:
    return causal_conv1d_step(x, state.clone(), weight, bias, "silu", **options)  # type: ignore[arg-type]


def _projection(size: Size, packing: bool, length: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x as a view into Mamba-2's input projection [z | x, B, C | dt], weight, bias, and document numbers if packed."""
    D, inner, batch = _width(size), size.heads * size.head_dim, size.batch if device == "cuda" else 1
    wide = torch.randn(batch, length, inner + D + size.heads, dtype=dtype, device=device)
    inputs = [wide[..., inner : inner + D].requires_grad_()]
    inputs += leaves(torch.randn(D, K) / 2, torch.randn(D), dtype=dtype, device=device)
    return [*inputs, documents(batch, length, device)] if packing else inputs


def _engram(batch: int, D: int, length: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    inputs = leaves(torch.randn(batch, length, D), torch.randn(D, K) / 2, dtype=dtype, device=device)
    return [*inputs, documents(batch, length, device)]


def _decoding(D: int, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = ((batch, D), (batch, K - 1, D), (D, K), (D,))
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def sweep() -> None:
    """Milliseconds of the forward and backward kernels on a card, for other rows, unrolling, channels and warps."""
    from triton.testing import do_bench

    from kernels.causal_conv1d import triton

    x, weight, bias, seq_idx = _projection(MOE_3B, True, MOE_3B.length, torch.bfloat16, "cuda")
    dy = torch.randn_like(x)
    age = triton.forward(x, weight, bias, seq_idx, None, 1, True, False)[2]
    calls: dict[str, Callable[..., object]] = {
        "forward": lambda ids, tile: triton.forward(x, weight, bias, ids, None, 1, True, False, tile),
        "backward": lambda ids, tile: triton.backward(
            dy, None, x, weight, bias, None if ids is None else age, None, 1, True, tile
        ),
    }
    rows = [["pass", "packed", "rows", "unroll", "channels", "warps", "ms"]]
    for name, ids in product(calls, (None, seq_idx)):
        timed = []
        for length, unroll, channels, warps in product((32, 64, 128, 256), (2, 4, 8), (2, 4, 8), (1, 2, 4)):
            tile = triton.Tile(rows=length, unroll=unroll, channels=channels, warps=warps)
            taken = do_bench(partial(calls[name], ids, tile))
            timed.append([taken, [name, str(ids is not None), *map(str, (length, unroll, channels, warps))]])
        rows += [[*cells, f"{taken:.4f}"] for taken, cells in sorted(timed)[:8]]
    print_table(rows)


def main() -> None:
    """Print the table."""
    if "sweep" in sys.argv[1:]:
        return sweep()
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
