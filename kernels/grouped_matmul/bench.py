"""Experts, forward and backward, with new routing at every call: ours, a loop over experts, transformers' GraniteMoe.

Fixed routing would hide what new shapes cost. ``python -m kernels.grouped_matmul.bench``.

Legend: T tokens, K chosen experts, D model width, E experts, F inner width.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.grouped_matmul.op import grouped_mlp
from kernels.grouped_matmul.reference import reference_grouped_mlp
from kernels.moe_permute import permute, unpermute

T, K, D, E, INNER = 2048, 2, 256, 8, 256
ROUNDS, WARMUP = 30, 10
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


def measure(dtype: torch.dtype) -> dict[str, list[float]]:
    """Milliseconds a call, candidates taking turns; raises where a candidate disagrees with fp64."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    gate_up = (torch.randn(E, D, 2 * INNER, generator=generator) / D**0.5).to(dtype).requires_grad_()
    down = (torch.randn(E, INNER, D, generator=generator) / INNER**0.5).to(dtype).requires_grad_()
    candidates: dict[str, Experts] = {"ours": ours, "loop over experts": sorted_loop}
    for implementation in ("eager", "grouped_mm"):
        candidates[f"GraniteMoeExperts {implementation}"] = granite(dtype, implementation, gate_up, down)
    check(candidates, dtype, routing(generator), (x_TD, gate_up, down))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        ids_TK, weights_TK = routing(generator)
        weights_TK.requires_grad_()
        for name, fn in candidates.items():
            start = time.perf_counter()
            fn(x_TD, ids_TK, weights_TK, gate_up, down).sum().backward()
            times[name].append(1e3 * (time.perf_counter() - start))
            x_TD.grad = None
    return {name: taken[WARMUP:] for name, taken in times.items()}


def check(candidates: dict[str, Experts], dtype: torch.dtype, routed: tuple, inputs: tuple) -> None:
    """Every candidate's output and gradient of x within 2 % (bf16) or 1e-5 (fp32) of fp64, by relative RMSE."""
    ids_TK, weights_TK = routed
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = sorted_loop(wide[0], ids_TK, weights_TK.double(), *wide[1:])
    expected_and_grad = (expected.detach(), torch.autograd.grad(expected.square().sum(), wide[0])[0])
    for name, fn in candidates.items():
        got = fn(inputs[0], ids_TK, weights_TK, *inputs[1:])
        got_and_grad = (got.detach(), torch.autograd.grad(got.square().sum(), inputs[0])[0])
        for a, b in zip(got_and_grad, expected_and_grad, strict=True):
            error = float((a.double() - b).norm() / b.norm())
            if not error < (2e-2 if dtype == torch.bfloat16 else 1e-5):
                raise RuntimeError(f"{name} in {dtype} is {error:.1e} off the reference")


def main() -> None:
    """Print the table; ratios are medians of paired rounds."""
    print(f"{T} tokens x top-{K}, E {E}, D {D}, F {INNER}; forward + backward, new routing every call; "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        times = measure(dtype)
        for name, taken in times.items():
            ratio = statistics.median(theirs / own for theirs, own in zip(taken, times["ours"], strict=True))
            print(f"{dtype!s:15} {name:30} median {statistics.median(taken):7.1f} ms  min {min(taken):7.1f} ms  "
                  f"{ratio:5.2f}x ours")  # fmt: skip


if __name__ == "__main__":
    main()
