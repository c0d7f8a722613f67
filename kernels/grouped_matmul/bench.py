"""Experts, forward and backward, with new routing at every call: ours, a loop over experts, transformers' GraniteMoe.

Fixed routing would hide what new shapes cost. ``python -m kernels.grouped_matmul.bench``.

Legend: T tokens, K chosen experts, D model width, E experts, F inner width.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kernels.grouped_matmul.op import grouped_mlp
from kernels.grouped_matmul.reference import reference_grouped_mlp
from kernels.moe_permute import permute, unpermute
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


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
