"""causal_conv1d with SiLU beside nn.functional.conv1d with groups: ``python -m kernels.causal_conv1d.bench``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.op import causal_conv1d
from kernels.timing import Row, compare, machine, print_rows, relative_error

B, L, D, K = 4, 512, 640, 4


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


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
