"""linear_cross_entropy beside F.cross_entropy(F.linear): ``python -m kernels.linear_cross_entropy.bench``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy.op import linear_cross_entropy
from kernels.timing import Row, compare, machine, print_rows

T, V, D = 2048, 8192, 256


def measure() -> list[Row]:
    """bf16 and fp32, at the size of the benchmark model's head."""
    rows = []
    targets_T, dloss = torch.randint(V, (T,)), torch.tensor(1 / T)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets_T)

    def peer(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets_T, reduction="sum")

    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        inputs = [x.to(dtype).requires_grad_() for x in (torch.randn(T, D), 0.05 * torch.randn(V, D))]
        case = f"{T} x {V}, D {D}, {str(dtype)[6:]}"
        rows += compare(
            "linear_cross_entropy", case, ours, {"cross_entropy(linear)": peer}, inputs, limit=limit, dy=dloss, rounds=7
        )
    return rows


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
