"""Column- and row-parallel layers on 2 and 4 ranks against torch.nn.Linear with the same weights,
in fp64.

B batch, L length, D model width, F inner width.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from parallel.mesh import build_mesh, single_mesh
from parallel.mesh_plan import ParallelConfig
from parallel.placement import (
    Part,
    initialize_parameters,
    normal,
    placed_parameters,
    register_gradient_reduction,
)
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.parity import assemble, parameter_piece

B = 3
L = 8
D = 10
INNER = 24
SHARED = 6
# "shared" has one unit: every tensor rank holds it, and its gradient is summed.
PARTS = (
    Part(name="a", size=INNER, units=8),
    Part(name="b", size=INNER, units=8),
    Part(name="shared", size=6, units=1),
)


class Pair(nn.Module):
    """silu(a) * b, scaled by what the shared part says."""

    def __init__(self, mesh, scatter: bool = True) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(D, PARTS, mesh, normal(0.5))
        self.down = RowParallelLinear(
            INNER,
            D,
            mesh,
            normal(0.5),
            units=8,
            scatter=scatter,
        )

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        a, b, shared = self.up.split(self.up(x_BLD))
        return self.down(F.silu(a) * b * shared.sigmoid().mean(-1, keepdim=True))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(
        2,
        B,
        L,
        D,
        dtype=torch.float64,
        generator=generator,
    )
    return x, dy


def local_pair(sequence_parallel: bool, scatter: bool):
    """This rank's y, dx and weight gradients."""
    size = dist.get_world_size()
    mesh = build_mesh(ParallelConfig(tp=size, sequence_parallel=sequence_parallel))
    model = Pair(mesh, scatter)
    initialize_parameters(model, mesh, seed=0)
    model.double()
    register_gradient_reduction(model, mesh)
    mine = slice(None)
    if sequence_parallel:
        mine = slice(dist.get_rank() * L // size, (dist.get_rank() + 1) * L // size)
    x, dy = inputs()
    x = x[:, mine].clone().requires_grad_()
    y = model(x)
    y.backward(dy[:, mine] if scatter else dy)
    gradients = {name: parameter_piece(p, p.grad, mesh) for name, p in placed_parameters(model)}
    return y.detach().numpy(), x.grad.numpy(), gradients


def dense_pair():
    """The same by torch.nn.Linear on one process."""
    mine = Pair(single_mesh())
    initialize_parameters(mine, single_mesh(), seed=0)
    up = nn.Linear(D, 2 * INNER + SHARED, bias=False).double()
    down = nn.Linear(INNER, D, bias=False).double()
    up.weight.data.copy_(mine.up.weight)
    down.weight.data.copy_(mine.down.weight)
    x, dy = inputs()
    x.requires_grad_()
    a, b, shared = up(x).split([INNER, INNER, SHARED], -1)
    y = down(F.silu(a) * b * shared.sigmoid().mean(-1, keepdim=True))
    y.backward(dy)
    return y.detach(), x.grad, {"up.weight": up.weight.grad, "down.weight": down.weight.grad}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_pair_equals_linear(size, sequence_parallel):
    ranks = run_ranks(
        local_pair,
        size,
        sequence_parallel and size > 1,
        True,
    )
    y, dx, weights = dense_pair()
    for name, index, expected in (("y", 0, y), ("dx", 1, dx)):
        parts = [torch.from_numpy(rank[index]) for rank in ranks]
        for part in [torch.cat(parts, 1)] if sequence_parallel else parts:
            assert_close(name, part, expected, 1e-12)
    for name, expected in weights.items():
        whole = assemble([rank[2][name] for rank in ranks])
        assert_close(name, whole, expected, 1e-12)


def test_output_that_stays_whole_under_sequence_parallelism():
    """scatter=False: the input is cut along L, the output is whole on every rank."""
    y, dx, _ = dense_pair()
    ranks = run_ranks(local_pair, 2, True, False)
    for rank in ranks:
        assert_close("y", torch.from_numpy(rank[0]), y, 1e-12)
    assert_close(
        "dx",
        torch.from_numpy(np.concatenate([rank[1] for rank in ranks], 1)),
        dx,
        1e-12,
    )


def test_split_gives_the_parts_that_a_rank_holds():
    layer = ColumnParallelLinear(D, PARTS, single_mesh(), normal(1.0))
    assert [part.shape[-1] for part in layer.split(torch.zeros(B, L, 2 * INNER + SHARED))] == [
        INNER,
        INNER,
        SHARED,
    ]
