"""The SSD scan beside transformers' chunked torch path: ``python -m kernels.ssd.bench``."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.ssd.op import ssd
from kernels.timing import Row, compare, gradients, machine, print_rows, relative_error

BATCH, LENGTH, HEADS, WIDTH, STATE, GROUPS, CHUNK = 4, 512, 8, 64, 64, 1, 64
PEER_DEFAULT_CHUNK = 256  # chunk size in transformers' configurations of Mamba-2 and GraniteMoeHybrid


def make_inputs(dtype: torch.dtype) -> list[Tensor]:
    """x, dt, A, B, C, D, dt_bias at the scale of a freshly initialised Mamba-2 layer."""
    gen = torch.Generator().manual_seed(0)
    shapes = (BATCH, LENGTH, HEADS, WIDTH), (BATCH, LENGTH, HEADS), *[(BATCH, LENGTH, GROUPS, STATE)] * 2
    x, dt, B, C = (torch.randn(*shape, generator=gen).to(dtype) for shape in shapes)
    A, D, dt_bias = -torch.linspace(1, 16, HEADS), torch.ones(HEADS), torch.linspace(-6.9, -2.3, HEADS)
    return [tensor.requires_grad_() for tensor in (x, dt, A, B, C, D, dt_bias)]


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """One document a row, no final states."""
    y = ssd(x, dt, A, B, C, chunk_size=CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True)
    assert isinstance(y, Tensor)
    return y


def peer(chunk: int) -> Callable[..., Tensor]:
    """The scan of transformers' Mamba2Mixer and GraniteMoeHybrid as it runs without mamba_ssm."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        y = mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk, D=D, dt_bias=dt_bias, dt_softplus=True)
        return y.to(x.dtype)

    return scan


def measure() -> list[Row]:
    """bf16 and fp32 beside the peer at our chunk size and at its own; the oracle is the peer in fp32."""
    rows = []
    peers = {f"transformers, chunk {chunk}": peer(chunk) for chunk in (CHUNK, PEER_DEFAULT_CHUNK)}
    for dtype, limit in ((torch.bfloat16, 3e-2), (torch.float32, 1e-4)):
        inputs = make_inputs(dtype)
        exact = [x.detach().float().requires_grad_() for x in inputs]
        dy = torch.randn_like(inputs[0])
        error = relative_error(gradients(ours, inputs, dy), gradients(peer(CHUNK), exact, dy.float()))
        case = f"B{BATCH} L{LENGTH} H{HEADS} P{WIDTH} N{STATE}, {str(dtype)[6:]}"
        rows += compare("ssd", case, ours, peers, inputs, limit=limit, dy=dy, error=error)
    return rows


def main() -> None:
    """Print the table."""
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
