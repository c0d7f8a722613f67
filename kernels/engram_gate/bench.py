"""The gate beside its plain formula: ``python -m kernels.engram_gate.bench``."""

import torch
from torch import Tensor

from kernels.engram_gate import engram_gate
from kernels.engram_gate.reference import engram_gate_reference
from kernels.timing import Row, compare, gradients, machine, print_rows, relative_error

TOKENS, WIDTH, EPS = 2048, 256, 1e-5


def make_inputs(streams: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """h, k, v and the norms' weights; keys lean towards h, or away from it, because the slope has a pole at score 0."""
    h_BLSD = torch.randn(1, tokens, streams, WIDTH)
    k_BLSD = torch.randn_like(h_BLSD) + h_BLSD * (torch.randint(0, 2, (1, tokens, streams, 1)) * 2 - 1)
    inputs = [x.to(dtype) for x in (h_BLSD, k_BLSD, torch.randn(1, tokens, WIDTH))]
    inputs += [torch.rand(streams, WIDTH) + 0.5 for _ in range(2)]
    return [x.requires_grad_() for x in inputs]


def ours(h: Tensor, k: Tensor, v: Tensor, query_weight: Tensor, key_weight: Tensor) -> Tensor:
    """The gated values."""
    return engram_gate(h, k, v, query_weight, key_weight, EPS)


def plain(h: Tensor, k: Tensor, v: Tensor, query_weight: Tensor, key_weight: Tensor) -> Tensor:
    """The formula under autograd."""
    return engram_gate_reference(h, k, v, query_weight, key_weight, EPS)[0]


def measure() -> list[Row]:
    """One residual stream and four, checked against fp64."""
    rows = []
    for streams in (1, 4):
        for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
            few = make_inputs(streams, 100, dtype)
            exact = gradients(plain, [x.detach().double().requires_grad_() for x in few])
            case = f"{TOKENS} x {streams} x {WIDTH}, {str(dtype)[6:]}"
            rows += compare(
                "engram_gate",
                case,
                ours,
                {"the formula": plain},
                make_inputs(streams, TOKENS, dtype),
                limit=limit,
                error=relative_error(gradients(ours, few), exact),
                rounds=9,
            )
    return rows


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
