"""Experts, forward and backward, with new routing at every call: ours, a loop over experts, transformers' GraniteMoe.

Fixed routing would hide what new shapes cost. ``python -m kernels.grouped_matmul.bench``.

On a card a product of M rows takes 2 M D F operations and at least 2 (M D + E D F + M F) bytes in 16 bits: 256, 456 and
515 FLOPs a byte at the three sizes, 1,365 with 8 experts of 4,096 rows. An A100's tensor cores bind from 153 up, an
H200's from 206. The ceiling is cuBLAS' batched product of experts with equally many rows. Compiled for sm_90, a program
of our kernels (128 x 256, 8 warps, 144 KiB of shared memory) fills an SM, for sm_80 two do (128 x 128, 4 warps and
64 KiB each); ``sweep`` times other tiles.

Legend: T tokens, K chosen experts, D model width, E experts, F inner width.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend
from kernels.cases import SIZES, SMALL, Case
from kernels.grouped_matmul.op import grouped_matmul, grouped_mlp
from kernels.grouped_matmul.reference import reference_grouped_matmul, reference_grouped_mlp
from kernels.moe_permute import permute, unpermute
from kernels.swiglu import bench as swiglu
from kernels.timing import Row, machine, print_rows, relative_error, times_in_turn

T, K, D, E, INNER = 2048, 2, 256, 8, 256
ROUNDS, WARMUP = 15, 8  # new shapes build primitives: the first rounds meet most of them
Experts = Callable[..., torch.Tensor]


def ours(
    x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """permute, grouped_mlp, unpermute."""
    x_MD, permutation = permute(x_TD, ids_TK, E)
    return unpermute(grouped_mlp(x_MD, permutation.counts_E, gate_up, down), permutation, weights_TK)


def sorted_loop(
    x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The same rows through plain autograd: one product an expert, of exactly its rows."""
    x_MD, permutation = permute(x_TD, ids_TK, E)
    return unpermute(reference_grouped_mlp(x_MD, permutation.counts_E, gate_up, down), permutation, weights_TK)


def granite(dtype: torch.dtype, implementation: str, gate_up: torch.Tensor, down: torch.Tensor) -> Experts:
    """transformers' experts with the same weights, which lie there as (E, out, in)."""
    from transformers import GraniteMoeConfig
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeExperts

    config = GraniteMoeConfig(hidden_size=D, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    experts = GraniteMoeExperts(config).to(dtype)
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
        experts.down_proj.copy_(down.transpose(1, 2))
    return lambda x_TD, ids_TK, weights_TK, *_: experts(x_TD, ids_TK, weights_TK.to(dtype))


def routing(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_TK and weights_TK of a router with mild, ever-changing preferences."""
    logits_TE = torch.randn(T, E, generator=generator) + 0.3 * torch.randn(E, generator=generator)
    weights_TK, ids_TK = F.softmax(logits_TE, -1).topk(K)
    return ids_TK, weights_TK


def measure() -> list[Row]:
    """bf16 and fp32, every candidate with the same routing in a round and a new one in the next."""
    return [row for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)) for row in _rows(dtype, limit)]


def _rows(dtype: torch.dtype, limit: float) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    gate_up = (torch.randn(E, D, 2 * INNER, generator=generator) / D**0.5).to(dtype).requires_grad_()
    down = (torch.randn(E, INNER, D, generator=generator) / INNER**0.5).to(dtype).requires_grad_()
    peers: dict[str, Experts] = {"loop over experts": sorted_loop}
    for implementation in ("eager", "grouped_mm"):
        peers[f"GraniteMoeExperts {implementation}"] = granite(dtype, implementation, gate_up, down)
    error = largest_error([ours, *peers.values()], routing(generator), (x_TD, gate_up, down))

    def step(fn: Experts, routed: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        ids_TK, weights_TK = next(routed)
        fn(x_TD, ids_TK, weights_TK.requires_grad_(), gate_up, down).sum().backward()

    sets = [routing(generator) for _ in range(ROUNDS + WARMUP)]
    steps = [partial(step, fn, iter(sets)) for fn in (ours, *peers.values())]
    own, *others = times_in_turn(steps, ROUNDS, WARMUP)
    case = f"{T} tokens top-{K} of {E}, D {D}, {str(dtype)[6:]}"
    return [
        Row(op="experts", case=case, peer=name, error=error, limit=limit, ours_ms=own, peer_ms=taken)
        for name, taken in zip(peers, others, strict=True)
    ]


def largest_error(candidates: list[Experts], routed: tuple, inputs: tuple) -> float:
    """Of all candidates' outputs and gradients of x, against the loop in fp64."""
    ids_TK, weights_TK = routed
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = sorted_loop(wide[0], ids_TK, weights_TK.double(), *wide[1:])
    expected = y.detach(), torch.autograd.grad(y.square().sum(), wide[0])[0]
    errors = []
    for fn in candidates:
        y = fn(inputs[0], ids_TK, weights_TK, *inputs[1:])
        errors.append(relative_error((y.detach(), torch.autograd.grad(y.square().sum(), inputs[0])[0]), expected))
    return max(errors)


def gpu_cases() -> Iterator[Case]:
    """Gate and up of the presets' experts, evenly used and not; large experts; whole MLPs; their activation."""
    for size in SIZES:
        rows, shares = size.batch * size.length * size.top_k, ("even", "skewed", "one takes all")
        shape = (size.experts, size.d_model, 2 * size.expert_dim)
        for share in shares if size is not SMALL else ("even",):
            yield _matmul_case(f"{size.name}, {share}", share, shape, rows)
    yield _matmul_case("8 experts of 4096 rows", "even", (8, 4096, 4096), 8 * 4096)
    yield _matmul_case("small in float32", "even", (16, 512, 1024), 16384, torch.float32)
    for size in SIZES:
        yield _mlp_case(size.name, (size.experts, size.d_model, size.expert_dim), size.batch * size.length * size.top_k)
    yield from swiglu.gpu_cases()


def sweep() -> None:
    """Times of our kernels' tiles on this card, for the product and the weights' gradient."""
    from triton.testing import do_bench

    from kernels.grouped_matmul import triton

    for shape, rows in (((72, 1280, 1472), 98304), ((8, 4096, 4096), 32768)):
        x_MD, weight_EDF, counts_E = _operands(shape, "even", rows, torch.bfloat16, "cuda")
        ends_E = counts_E.cumsum(0).int()
        dy_MF = torch.randn(x_MD.shape[0], shape[2], device="cuda", dtype=torch.bfloat16)
        for tile in (
            triton.Tile(height, width, step, warps, stages)
            for height, width in ((128, 256), (256, 128), (128, 128))
            for step, stages in ((64, 3), (32, 4), (64, 4))
            for warps in (4, 8)
        ):
            groups = triton.groups(x_MD, ends_E, tile=tile)
            times = []
            for run in (
                partial(triton.product, x_MD, weight_EDF, groups),
                partial(triton.weight_gradient, x_MD, dy_MF, groups, tile),
            ):
                try:
                    times.append(f"{do_bench(run):.3f} ms")
                except Exception as error:  # a tile that does not fit is a result too
                    times.append(type(error).__name__)
            print(shape, rows, tile, "product", times[0], "weights", times[1], flush=True)


def _matmul_case(
    name: str, share: str, shape: tuple[int, int, int], rows: int, dtype: torch.dtype = torch.bfloat16
) -> Case:
    (E, D, F), M, size = shape, rows // shape[0] * shape[0], dtype.itemsize
    values = M * D + M * F + E * D * F
    return Case(
        op="grouped_matmul",
        shapes=f"{name}: {M} x {D} x {F}, {E} experts",
        make=partial(_operands, shape, share),
        full=rows,
        tiny=384,
        ours=grouped_matmul,
        exact=reference_grouped_matmul,
        bytes_moved=(size * values, size * (3 * values - M * F)),
        flops=(2 * M * D * F, 6 * M * D * F),
        peers={
            "our Triton kernels": lambda: partial(grouped_matmul, backend="triton"),
            "loop over experts": lambda: reference_grouped_matmul,
            "dense: bmm of even experts": lambda: _dense,
        },
        dtype=dtype,
        limit=2e-2 if dtype is torch.bfloat16 else 1e-5,
    )


def _mlp_case(name: str, shape: tuple[int, int, int], rows: int) -> Case:
    (E, D, F), M = shape, rows // shape[0] * shape[0]

    def loop(x_MD: Tensor, gate_up: Tensor, down: Tensor, counts_E: Tensor) -> Tensor:
        return reference_grouped_mlp(x_MD, counts_E, gate_up, down)

    def mlp(x_MD: Tensor, gate_up: Tensor, down: Tensor, counts_E: Tensor, backend: Backend | None = None) -> Tensor:
        return grouped_mlp(x_MD, counts_E, gate_up, down, backend=backend)

    return Case(
        op="grouped_mlp",
        shapes=f"{name}: {M} x {D} x {F}, {E} experts",
        make=partial(_mlp_operands, shape),
        full=rows,
        tiny=384,
        ours=mlp,
        exact=loop,
        bytes_moved=(2 * (2 * M * D + 3 * E * D * F), 2 * (5 * M * D + 9 * E * D * F)),
        flops=(6 * M * D * F, 18 * M * D * F),
        peers={"our Triton kernels": lambda: partial(mlp, backend="triton"), "loop over experts": lambda: loop},
    )


def _dense(x_MD: Tensor, weight_EDF: Tensor, _: Tensor) -> Tensor:
    """The same FLOPs whatever the routing; the same result where it is even."""
    return torch.bmm(x_MD.view(weight_EDF.shape[0], -1, x_MD.shape[1]), weight_EDF).flatten(0, 1)


def _operands(shape: tuple[int, int, int], share: str, rows: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, weights and counts, which are equal, fall like 1 / (1 + expert), or are all of the last expert.

    Fewer experts where there are too few rows for 128 each: then the tiles that compile are those of the full size.
    """
    E = min(shape[0], rows // 128)
    M = rows // E * E
    parts = {"even": torch.ones(E), "skewed": 1 / torch.arange(1, E + 1), "one takes all": torch.arange(E) == E - 1}
    ends_E = (parts[share].double().cumsum(0) / parts[share].sum() * M).round().long()
    x_MD = torch.randn(M, shape[1], device=device, dtype=dtype)
    weight_EDF = torch.randn(E, *shape[1:], device=device, dtype=dtype) / shape[1] ** 0.5
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).to(device)
    return [x_MD.requires_grad_(), weight_EDF.requires_grad_(), counts_E]


def _mlp_operands(shape: tuple[int, int, int], rows: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    E, D, F = shape
    x_MD, gate_up, counts_E = _operands((E, D, 2 * F), "even", rows, dtype, device)
    down = torch.randn(gate_up.shape[0], F, D, device=device, dtype=dtype) / F**0.5
    return [x_MD, gate_up, down.requires_grad_(), counts_E]


def main() -> None:
    """Print the table; with ``sweep``, time tiles on a card instead."""
    if sys.argv[1:] == ["sweep"]:
        return sweep()
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
