"""Products of experts, whole MLPs, and experts with permutation beside transformers' GraniteMoe.

The last get new routing at every call: a fixed one would hide what new shapes cost.

On a card a product of M rows takes 2 M D F operations and at least 2 (M D + E D F + M F) bytes in
16 bits: 256, 456 and 515 FLOPs a byte at the three sizes, 1,365 with 8 experts of 4,096 rows. An
A100's tensor cores bind from 153 up, an H200's from 206. The ceiling is cuBLAS' batched product of
experts with equally many rows. Compiled for sm_90, a program of our kernels (128 x 256, 8 warps,
144 KiB of shared memory) fills an SM, for sm_80 two do (128 x 128, 4 warps and 64 KiB each);
``python -m kernels.grouped_matmul.bench`` times other tiles on a card.

Legend: T tokens, K chosen experts, D model width, E experts, F inner width.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from kernels.backend import Backend
from kernels.cases import MOE_3B, SMALL, Case, Op, Size, leaves
from kernels.grouped_matmul.op import grouped_matmul, grouped_mlp
from kernels.grouped_matmul.reference import reference_grouped_matmul, reference_grouped_mlp
from kernels.moe_permute import permute, unpermute

SHARES = ("even", "skewed", "one takes all")


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """Gate and up of the presets' experts, evenly used and not; large experts; whole MLPs; experts
    with routing.
    """
    rows = size.tokens * size.top_k
    E = size.experts
    D = size.d_model
    F = size.expert_dim
    for share in SHARES if size.name != SMALL.name else SHARES[:1]:
        yield _matmul_case(
            f"{size.name}, {share}",
            share,
            (E, D, 2 * F),
            rows,
            dtype,
        )
    if size is MOE_3B:
        yield _matmul_case(
            "8 experts of 4096 rows",
            "even",
            (8, 4096, 4096),
            8 * 4096,
            dtype,
        )
    if size is SMALL and dtype is torch.bfloat16:
        yield _matmul_case(
            f"{size.name}, even",
            "even",
            (E, D, 2 * F),
            rows,
            torch.float32,
        )
    yield _mlp_case(size.name, (E, D, F), rows, dtype)
    yield _experts_case(size, dtype)


def _matmul_case(
    name: str,
    share: str,
    shape: tuple[int, int, int],
    rows: int,
    dtype: torch.dtype,
) -> Case:
    (E, D, F) = shape
    M = rows // shape[0] * shape[0]
    w = dtype.itemsize
    values = M * D + M * F + E * D * F
    return Case(
        op="grouped_matmul",
        shapes=f"{name}: {M} x {D} x {F}, {E} experts",
        make=partial(_operands, shape, share),
        full=rows,
        tiny=384,
        ours=grouped_matmul,
        exact=reference_grouped_matmul,
        bytes_moved=(w * values, w * (3 * values - M * F)),
        flops=(2 * M * D * F, 6 * M * D * F),
        peers={
            "our Triton kernels": lambda: partial(grouped_matmul, backend="triton"),
            "loop over experts": lambda: reference_grouped_matmul,
            "dense: bmm of even experts": lambda: _dense,
        },
        cpu_peers={"dense: bmm of even experts": lambda: _dense},
        dtype=dtype,
    )


def _mlp_case(
    name: str,
    shape: tuple[int, int, int],
    rows: int,
    dtype: torch.dtype,
) -> Case:
    (E, D, F) = shape
    M = rows // shape[0] * shape[0]
    w = dtype.itemsize

    def loop(
        x_MD: Tensor,
        gate_up: Tensor,
        down: Tensor,
        counts_E: Tensor,
    ) -> Tensor:
        return reference_grouped_mlp(x_MD, counts_E, gate_up, down)

    def mlp(
        x_MD: Tensor,
        gate_up: Tensor,
        down: Tensor,
        counts_E: Tensor,
        backend: Backend | None = None,
    ) -> Tensor:
        return grouped_mlp(x_MD, counts_E, gate_up, down, backend=backend)

    return Case(
        op="grouped_mlp",
        shapes=f"{name}: {M} x {D} x {F}, {E} experts",
        make=partial(_mlp_operands, shape),
        full=rows,
        tiny=384,
        ours=mlp,
        exact=loop,
        bytes_moved=(w * (2 * M * D + 3 * E * D * F), w * (5 * M * D + 9 * E * D * F)),
        flops=(6 * M * D * F, 18 * M * D * F),
        peers={
            "our Triton kernels": lambda: partial(mlp, backend="triton"),
            "loop over experts": lambda: loop,
        },
        dtype=dtype,
    )


def _experts_case(size: Size, dtype: torch.dtype) -> Case:
    T = size.tokens
    K = size.top_k
    E = size.experts
    D = size.d_model
    F = size.expert_dim
    w = dtype.itemsize
    granite: dict[str, Callable[[], Op]] = {
        f"GraniteMoeExperts {way}": partial(_granite, size, dtype, way)
        for way in ("eager", "grouped_mm")
    }
    return Case(
        op="experts",
        shapes=f"{size.name}: {T} tokens top-{K} of {E}, D {D}, F {F}, new routing at each call",
        make=partial(_layer, size),
        full=T,
        tiny=192,
        ours=NewRouting(_experts, K),
        exact=NewRouting(_sorted_loop, K),
        bytes_moved=(w * (2 * T * D + 3 * E * D * F), w * (5 * T * D + 9 * E * D * F)),
        flops=(6 * T * K * D * F, 18 * T * K * D * F),
        peers=granite,
        cpu_peers=granite,
        composed=True,
        dtype=dtype,
    )


class NewRouting:
    """``experts(x, ids, weights, gate_up, down)`` with mild, ever-changing preferences, the same
    for every instance.
    """

    def __init__(self, experts: Op, top_k: int) -> None:
        self.experts = experts
        self.top_k = top_k
        self.generator = torch.Generator().manual_seed(0)

    def __call__(
        self,
        x_TD: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        T = x_TD.shape[0]
        E = gate_up.shape[0]
        logits_TE = torch.randn(T, E, generator=self.generator) + 0.3 * torch.randn(
            E, generator=self.generator
        )
        weights_TK, ids_TK = logits_TE.to(x_TD.device).softmax(-1).topk(min(self.top_k, E))
        return self.experts(x_TD, ids_TK, weights_TK, gate_up, down)


def _experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    x_MD, permutation = permute(x_TD, ids_TK, gate_up.shape[0], dropless=True)
    return unpermute(
        grouped_mlp(x_MD, permutation.counts_E, gate_up, down), permutation, weights_TK
    )


def _sorted_loop(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    """The same rows through plain autograd: one product an expert, of exactly its rows."""
    x_MD, permutation = permute(
        x_TD,
        ids_TK,
        gate_up.shape[0],
        dropless=True,
        backend="torch",
    )
    y_MD = reference_grouped_mlp(
        x_MD,
        permutation.counts_E,
        gate_up,
        down,
    )
    return unpermute(y_MD, permutation, weights_TK, backend="torch")


def _granite(size: Size, dtype: torch.dtype, implementation: str) -> Op:
    """transformers' experts with the same weights, which lie there as (E, out, in)."""
    from transformers import GraniteMoeConfig
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeExperts

    config = GraniteMoeConfig(
        hidden_size=size.d_model,
        intermediate_size=size.expert_dim,
        num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = GraniteMoeExperts(config)

    def run(
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        weights = {"gate_up_proj": gate_up.transpose(1, 2), "down_proj": down.transpose(1, 2)}
        y: Tensor = functional_call(module, weights, (x_TD, ids_TK, weights_TK.to(dtype)))
        return y

    return NewRouting(run, size.top_k)


def _layer(
    size: Size,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    """Fewer experts where there are few rows, as for the products."""
    E = min(size.experts, max(1, tokens * size.top_k // 128))
    D = size.d_model
    F = size.expert_dim
    shapes = {(tokens, D): 1.0, (E, D, 2 * F): D**0.5, (E, F, D): F**0.5}
    return leaves(
        *(torch.randn(shape) / scale for shape, scale in shapes.items()), dtype=dtype, device=device
    )


def sweep() -> None:
    """Times of our kernels' tiles on this card, for the product and the weights' gradient."""
    from triton.testing import do_bench

    from kernels.grouped_matmul import triton

    for shape, rows in (((72, 1280, 1472), 98304), ((8, 4096, 4096), 32768)):
        x_MD, weight_EDF, counts_E = _operands(shape, "even", rows, torch.bfloat16, "cuda")
        ends_E = counts_E.cumsum(0).int()
        dy_MF = torch.randn(
            x_MD.shape[0],
            shape[2],
            device="cuda",
            dtype=torch.bfloat16,
        )
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
            print(
                shape,
                rows,
                tile,
                "product",
                times[0],
                "weights",
                times[1],
                flush=True,
            )


def _dense(x_MD: Tensor, weight_EDF: Tensor, _: Tensor) -> Tensor:
    """The same FLOPs whatever the routing; the same result where it is even."""
    return torch.bmm(x_MD.view(weight_EDF.shape[0], -1, x_MD.shape[1]), weight_EDF).flatten(0, 1)


def _operands(
    shape: tuple[int, int, int],
    share: str,
    rows: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    """x, weights and counts, which are equal, fall like 1 / (1 + expert), or are all of the last
    expert.

    Fewer experts where there are too few rows for 128 each: then the tiles that compile are those
    of the full size.
    """
    E = min(shape[0], rows // 128)
    M = rows // E * E
    parts = {
        "even": torch.ones(E),
        "skewed": 1 / torch.arange(1, E + 1),
        "one takes all": torch.arange(E) == E - 1,
    }
    ends_E = (parts[share].double().cumsum(0) / parts[share].sum() * M).round().long()
    x_MD = torch.randn(M, shape[1], device=device, dtype=dtype)
    weight_EDF = torch.randn(E, *shape[1:], device=device, dtype=dtype) / shape[1] ** 0.5
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).to(device)
    return [x_MD.requires_grad_(), weight_EDF.requires_grad_(), counts_E]


def _mlp_operands(
    shape: tuple[int, int, int],
    rows: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    E, D, F = shape
    x_MD, gate_up, counts_E = _operands((E, D, 2 * F), "even", rows, dtype, device)
    down = (
        torch.randn(
            gate_up.shape[0],
            F,
            D,
            device=device,
            dtype=dtype,
        )
        / F**0.5
    )
    return [x_MD, gate_up, down.requires_grad_(), counts_E]


if __name__ == "__main__":
    sweep()
