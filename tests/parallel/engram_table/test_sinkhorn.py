"""Momentum and Sinkhorn on rows, against the dense algorithm."""

import math

import numpy as np
import pytest
import torch

from parallel.engram_table import TableConfig, TableShape
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.helpers.table_rows import make_tables, train
from tests.helpers.table_use import load


class DenseSinkhorn:
    """V4.1's algorithm as it is written, over the whole table in fp64."""

    def __init__(self, weight: torch.Tensor, config: TableConfig) -> None:
        self.weight = weight.double().clone()
        self.config = config
        self.momentum = torch.zeros_like(self.weight)

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        beta = self.config.momentum
        eps = 1e-20
        self.momentum = beta * self.momentum + (1 - beta) * grad
        g = beta * self.momentum + (1 - beta) * grad
        rho = g.norm(dim=1, keepdim=True)
        u = torch.where(rho <= self.config.sinkhorn_threshold * rho.mean(), 0, g)
        for k in range(1, self.config.sinkhorn_iterations + 1):
            u = u / (u.norm(dim=k % 2, keepdim=True) + eps)
        return u * math.sqrt(u.shape[1])

    def step(self, grad: torch.Tensor, rate: float) -> torch.Tensor:
        update = self.direction(grad)
        self.weight -= (
            self.config.sinkhorn_scale * rate * self.config.learning_rate_multiple * update
        )
        return update


def test_dense_sinkhorn_gives_the_golden_update():
    row = torch.arange(6)[:, None]
    column = torch.arange(4)
    grad = ((4 * row + column) % 7 - 3) * torch.tensor([1, 10, 0.1, 0, 1e-4, 2])[:, None]
    update = DenseSinkhorn(torch.zeros(6, 4), TableConfig()).direction(grad.double())
    golden = [
        [-1.305448, -1.214165, -0.906426, 0],
        [0.211385, 0.589813, 1.320962, -1.364733],
        [-1.229888, -0.857916, 0, 1.323388],
        [0] * 4,
        [0] * 4,
        [0.861512, -1.201906, -1.196366, -0.618004],
    ]
    assert_close(
        "update",
        update,
        torch.tensor(golden).double(),
        1e-6,
    )


SINKHORN = TableConfig(
    prefetch=0, optimizer="momentum_sinkhorn", momentum=0.8, learning_rate_multiple=2.0
)


def sinkhorn_ids(step: int) -> torch.Tensor:
    """Rows that are touched always, now and then, once and never again; bursts of many; row 60
    never.
    """
    ids = torch.tensor([1, 1, 5 + step % 7, 20 + (step // 9) % 11])
    return torch.cat([ids, torch.arange(32, 60)]) if step in (0, 30) else ids


def sinkhorn_grad(step: int) -> torch.Tensor:
    ids = sinkhorn_ids(step)
    generator = torch.Generator().manual_seed(step)
    return torch.randn(len(ids), 8, generator=generator) * (0.1 + ids[:, None] % 5)


def sinkhorn_run(steps: int) -> tuple[list, int]:
    tables = make_tables(TableShape(61, 8), SINKHORN)
    size = tables.mesh.size("engram")
    rank = tables.mesh.rank("engram")
    states = []
    for step in range(steps):
        ids = sinkhorn_ids(step)
        grad = sinkhorn_grad(step)
        train(tables, ids[rank::size], grad[rank::size], step)
        states.append(tables.state()["engram.2.weight"].tensor.numpy().copy())
    return states, tables.owned(2).start


@pytest.mark.parametrize("size", [1, 2, 4])
def test_momentum_sinkhorn_is_the_dense_algorithm(size):
    """75 steps: long enough for rows to fall below the threshold (31 steps at 0.8) and to be
    touched again.
    """
    reports = run_ranks(sinkhorn_run, size, 75) if size > 1 else [sinkhorn_run(75)]
    dense = DenseSinkhorn(
        make_tables(TableShape(61, 8), SINKHORN).state()["engram.2.weight"].tensor, SINKHORN
    )
    rested = 0
    for step in range(75):
        grad = (
            torch.zeros(61, 8)
            .double()
            .index_add_(0, sinkhorn_ids(step), sinkhorn_grad(step).double())
        )
        update = dense.step(grad, 1e-2)
        rested += int(((update == 0).all(1) & (dense.momentum != 0).any(1)).sum())
        rows = torch.from_numpy(np.concatenate([states[step] for states, _ in reports]))
        assert_close(
            f"rows after step {step}",
            rows,
            dense.weight.float(),
            1e-6,
        )
    assert rested > 100, "no row ever rested: the threshold was not tested"


def test_only_a_load_makes_momentum_sinkhorn_ask_the_whole_table():
    """A save looks at the state in every interval: a step proportional to the table would follow
    each.
    """
    tables = make_tables(TableShape(61, 8), SINKHORN)
    train(tables, sinkhorn_ids(0), sinkhorn_grad(0), 0)
    tables.state()
    assert tables._optimizer._candidates is not None
    load(tables, tables.state())
    assert tables._optimizer._candidates is None


def test_momentum_sinkhorn_goes_on_bitwise_from_its_state():
    whole = make_tables(TableShape(61, 8), SINKHORN)
    stopped = make_tables(TableShape(61, 8), SINKHORN)
    for step in range(40):
        train(whole, sinkhorn_ids(step), sinkhorn_grad(step), step)
        train(
            stopped,
            sinkhorn_ids(step),
            sinkhorn_grad(step),
            step,
        )
    resumed = make_tables(TableShape(61, 8), SINKHORN)
    used = make_tables(TableShape(61, 8), SINKHORN)
    train(used, torch.tensor([60]), torch.ones(1, 8), 0)  # what it thinks of moving must go, too
    for tables in (resumed, used):
        load(tables, stopped.state())
    for step in range(40, 60):
        for tables in (whole, resumed, used):
            train(
                tables,
                sinkhorn_ids(step),
                sinkhorn_grad(step),
                step,
            )
    for name, piece in whole.state().items():
        assert torch.equal(piece.tensor, resumed.state()[name].tensor), name
        assert torch.equal(piece.tensor, used.state()[name].tensor), name
