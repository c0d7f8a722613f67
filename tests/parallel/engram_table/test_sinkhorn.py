"""Optimizers of rows: each against its formula, a dense reference, or tensor operations."""

import math

import numpy as np
import pytest
import torch

from parallel.engram_table import TableConfig, TableShape, host_kernels
from parallel.engram_table.lazy_adam import LazyAdam
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.helpers.table_rows import FORMATS, heap, make_store, make_tables, train


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adam"])
@pytest.mark.parametrize("form", FORMATS)
def test_host_kernel_is_the_tensor_operations(form, optimizer):
    config = TableConfig(rows=form, optimizer=optimizer, weight_decay=0.1)
    adams = [LazyAdam(make_store(form), config, heap) for _ in range(2)]
    start = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 3, 9, 10, 39])
    for adam in adams:
        adam.store.write(torch.arange(40), start, torch.zeros(40))
    for step in range(4):
        grad = torch.randn(5, 64, generator=torch.Generator().manual_seed(step)) * 10.0**-step
        adams[0].update(rows, grad, 1e-2, 0.5, step)
        adams[1].update_block(rows, grad * 0.5, 1e-2 * config.learning_rate_multiple)
    for name in adams[0].state():
        assert_close(
            name,
            adams[0].state()[name],
            adams[1].state()[name],
            5e-7,
        )
    if form == "fp32":
        assert_close(
            "rows",
            adams[0].store.weight,
            adams[1].store.weight,
            1e-7,
        )
    else:  # the last bit of the new value rarely decides how it is rounded
        for name, tensor in adams[0].store.tensors.items():
            assert (tensor != adams[1].store.tensors[name]).float().mean() < 1e-2, name
    moved = (
        (adams[0].store.read(torch.arange(40)) != make_read(form, start)).any(1).nonzero().flatten()
    )
    assert moved.tolist() == rows.tolist()


def make_read(form: str, values: torch.Tensor) -> torch.Tensor:
    store = make_store(form)
    store.write(torch.arange(40), values, torch.zeros(40))
    return store.read(torch.arange(40))


@pytest.mark.parametrize("form", FORMATS)
def test_host_kernel_moves_rows_as_tensor_operations_do(form):
    stores = [make_store(form) for _ in range(2)]
    start = torch.randn(40, 64)
    for store in stores:
        store.write(torch.arange(40), start, torch.zeros(40))
    rows = torch.tensor([0, 3, 9, 39])
    g_AW = torch.randn(4, 64)
    r_A = torch.rand(4)
    c_W = torch.rand(64) / 10
    host_kernels.move(stores[0], rows, g_AW, r_A, c_W, 7)
    changed = stores[1].read(rows) - g_AW * r_A[:, None] * c_W
    stores[1].write(rows, changed, torch.full((4,), 7))
    for name, tensor in stores[0].tensors.items():
        assert torch.equal(tensor, stores[1].tensors[name]), name


def test_host_kernel_sums_of_normalised_rows():
    g_AW = (
        torch.randn(9000, 5, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-15, 0, 9000)[:, None]
    )
    norm_A = torch.linalg.vector_norm(g_AW, dim=1)
    c2_W = torch.tensor([0.5, 1, 2, 1e-3, 1])
    r2_A, sums_W = host_kernels.sinkhorn_sums(g_AW, norm_A, c2_W)
    squares = (g_AW.double() / norm_A.double()[:, None]).square()
    expected_A = 1 / (squares @ c2_W.double())
    assert_close("r2", r2_A, expected_A.float(), 1e-6)
    assert_close("sums", sums_W, expected_A @ squares, 1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adam"])
def test_adam_on_touched_rows_is_its_formula(optimizer):
    """Over 50 steps in fp64, a row at a time: rows count their own steps, and rest where they are
    not touched.
    """
    config = TableConfig(
        prefetch=0, optimizer=optimizer, betas=(0.9, 0.95), learning_rate_multiple=2.0
    )
    tables = make_tables(TableShape(9, 8), config)
    weight = tables.state()["engram.2.weight"].tensor.double().clone()
    mean = torch.zeros(9, 8).double()
    square = torch.zeros(9, 8).double()
    counts = [0] * 9
    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 9, (4,), generator=generator)
        grad = torch.randn(4, 8, generator=generator)
        train(tables, ids, grad, step)
        dense = torch.zeros(9, 8).double().index_add_(0, ids, grad.double())
        for row in set(ids.tolist()):
            counts[row] += 1
            mean[row] = 0.9 * mean[row] + 0.1 * dense[row]
            squares = dense[row].square() if optimizer == "adam" else dense[row].square().mean()
            square[row] = 0.95 * square[row] + 0.05 * squares
            corrected = square[row] / (1 - 0.95 ** counts[row])
            weight[row] -= (
                2e-2 * mean[row] / (1 - 0.9 ** counts[row]) / (corrected.sqrt() + config.eps)
            )
    assert_close(
        "rows",
        tables.state()["engram.2.weight"].tensor,
        weight.float(),
        1e-6,
    )


def test_what_is_lazy_about_adam_on_touched_rows():
    """Beside ``torch.optim.Adam`` over the whole table, 200 steps of equal gradients: row 0 is
    touched by every step, row 1 once, row 2 by every tenth. A touch moves a row by one step, and
    then it rests; dense Adam lets its moments move it on, by 5.8 steps in all.
    """
    config = TableConfig(prefetch=0, learning_rate_multiple=1.0, betas=(0.9, 0.95))
    tables = make_tables(TableShape(3, 8), config)
    begin = tables.state()["engram.2.weight"].tensor.clone()
    weight = torch.nn.Parameter(begin.clone())
    adam = torch.optim.Adam(
        [weight],
        lr=1e-3,
        betas=config.betas,
        eps=config.eps,
    )
    for step in range(200):
        rows = torch.tensor([0] + [1] * (step == 99) + [2] * (step % 10 == 0))
        train(
            tables,
            rows,
            torch.ones(len(rows), 8),
            step,
            rate=1e-3,
        )
        weight.grad = torch.zeros(3, 8).index_fill_(0, rows, 1.0)
        adam.step()
    lazy, dense = (
        ((begin - moved.detach()) / 1e-3).mean(1).tolist()
        for moved in (tables.state()["engram.2.weight"].tensor, weight)
    )
    assert lazy == pytest.approx([200, 1, 20], rel=1e-4)
    assert dense == pytest.approx([200, 5.82, 63.5], rel=1e-3)


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
    tables.load_state(tables.state())
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
        tables.load_state(stopped.state())
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


def test_short_rows_learn_what_rounding_to_nearest_would_lose():
    """Steps of a hundredth of a unit in the last place: on average they arrive."""
    for form, unit in (("bf16", 2.0**-7), ("fp8", 2.0**-3)):
        config = TableConfig(
            prefetch=0, rows=form, betas=(0.0, 0.0), eps=0.0, learning_rate_multiple=1.0
        )
        tables = make_tables(TableShape(64, 64), config, std=0.0)
        store = tables._store
        store.write(torch.arange(64), torch.full((64, 64), 1.5), torch.zeros(64))
        for step in range(100):
            train(
                tables,
                torch.arange(64),
                torch.ones(64, 64),
                step,
                rate=unit / 100,
            )
        mean = store.read(torch.arange(64)).mean().item()
        assert mean == pytest.approx(1.5 - unit, abs=unit / 20), form
