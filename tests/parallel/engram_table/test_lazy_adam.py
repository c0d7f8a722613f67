"""Adam on touched rows, against its formula and tensor operations."""

import pytest
import torch

from parallel.engram_table import TableConfig, TableShape
from parallel.engram_table.lazy_adam import LazyAdam
from tests.helpers.compare import assert_close
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
        adams[1].update_block(rows, grad * 0.5, adams[1].step_at(1e-2))
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
