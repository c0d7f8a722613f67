"""Hot rows: the same bits with and without, never stale; which rows are hot; how their use is
counted.
"""

import math
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch

from parallel.engram_table import EngramTables, TableConfig, TableShape, hot_rows, storage
from parallel.engram_table.hot_rows import HotRows
from parallel.errors import RunError
from parallel.mesh import single_mesh
from parallel.table_bytes import hot_bytes, hot_sets
from parallel.table_config import table_problems
from tests.helpers.ranks import run_ranks
from tests.helpers.table_rows import make_mesh
from tests.helpers.table_use import load, look_up
from tests.helpers.tiny import made_up_batches, make_trainer, tiny_config
from tests.parity import quiet_libraries
from training.step import train_step

CPU = torch.device("cpu")
WIDTH = 32
TOKENS = 24
STEPS = 50
SHAPES = {1: TableShape(61, WIDTH), 3: TableShape(40, WIDTH)}
OPTIMIZERS = ("adam", "rowwise_adam", "momentum_sinkhorn")


def make_tables(config: TableConfig, device=CPU, dtype=torch.float32, **options) -> EngramTables:
    return EngramTables(
        SHAPES, make_mesh(), config, init_std=0.5, seed=3, device=device, dtype=dtype, **options
    )


def ids_of(step: int, micro: int, rank: int) -> dict[int, torch.Tensor]:
    """(TOKENS, 2) a layer: a few rows in most micro-batches, which drift, and others now and then;
    some are masked.
    """
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    uniform = torch.rand(len(SHAPES), TOKENS, 2, generator=generator)
    ids = {}
    for (layer, shape), draw in zip(SHAPES.items(), uniform, strict=True):
        ids[layer] = ((draw**3 * shape.num_rows).long() + step // 20) % shape.num_rows
        ids[layer][::11] = -1
    return ids


def train(
    tables: EngramTables, num_micro: int, busy=lambda: None, first_step: int = 0, ahead: bool = True
) -> dict:
    """What ``embed`` gave in every micro-batch, and the state after all steps.

    Args:
        busy: other work of the device, beside which the table's work must keep its order.
        first_step: the number of the first step, for the optimizer.
        ahead: rows move a micro-batch ahead, past the update of the step before; otherwise when
            they are needed.
    """
    rank = tables.mesh.rank("engram")
    device = tables.device
    order = [(step, micro) for step in range(STEPS) for micro in range(num_micro)]
    outputs = []
    coming = [tables.fetch(ids_of(*order[0], rank))] if ahead else []
    for place, (step, micro) in enumerate(order):
        if place + ahead < len(order):
            coming.append(tables.fetch(ids_of(*order[place + ahead], rank)))
        rows = coming.pop(0)
        busy()
        for fetched in rows.values():
            embedded = fetched.embed()
            weights = torch.linspace(-1, 1, embedded.numel(), device=device).view(embedded.shape)
            (embedded.float() * weights).square().sum().backward()
            outputs.append(embedded.detach().float())
        tables.accumulate(rows)
        if micro == num_micro - 1:
            tables.squared_grad_norm()
            tables.step(1e-2, 0.5, first_step + step)
    report = {str(n): output.cpu().numpy() for n, output in enumerate(outputs)}
    return report | {
        name: piece.tensor.cpu().float().numpy() for name, piece in tables.state().items()
    }


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )


def run(config: TableConfig, num_micro: int, dtype: str = "float32") -> dict:
    return train(make_tables(config, dtype=getattr(torch, dtype)), num_micro)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("form", "dtype", "prefetch", "num_micro"),
    [("fp32", "float32", 1, 1), ("bf16", "bfloat16", 0, 2), ("fp8", "float32", 2, 2)],
)
def test_hot_rows_change_no_bit(form, dtype, prefetch, num_micro, optimizer):
    config = TableConfig(
        rows=form,
        optimizer=optimizer,
        prefetch=prefetch,
        weight_decay=0.0,
    )
    tables = make_tables(replace(config, hot_rows=16), dtype=getattr(torch, dtype))
    kept = []
    hits = []
    ask = tables._hot.ask

    def watched(rows_U):
        values, num_hot = ask(rows_U)
        kept.append(set(tables._hot._kept_SV.flatten().tolist()))
        hits.append(num_hot)
        return values, num_hot

    with mock.patch.object(tables._hot, "ask", watched):
        cached = train(tables, num_micro)
    assert same(cached, run(config, num_micro, dtype))
    assert sum(after != before for before, after in pairwise(kept)) > 15, "nothing was evicted"
    assert sum(hits) > len(hits), "nothing was hot"


@pytest.mark.parametrize("optimizer", ["adam", "momentum_sinkhorn"])
def test_hot_rows_change_no_bit_on_two_ranks(optimizer):
    config = TableConfig(optimizer=optimizer, rows="bf16", prefetch=1)
    plain, cached = (run_ranks(run, 2, replace(config, hot_rows=hot), 2) for hot in (0, 8))
    assert all(same(one, other) for one, other in zip(plain, cached, strict=True))


def uneven_run(config: TableConfig) -> dict:
    """Ranks with 24, 5 and no tokens in a micro-batch, in turns; the last rank never has one."""
    everything = ids_of
    size = make_mesh().size("engram")

    def mine(step, micro, rank):
        tokens = 0 if rank == size - 1 else (24, 5, 0)[(step + micro + rank) % 3]
        return {layer: ids[:tokens] for layer, ids in everything(step, micro, rank).items()}

    with mock.patch.dict(globals(), ids_of=mine):
        return train(make_tables(config), 2, ahead=config.prefetch > 0)


@pytest.mark.parametrize("optimizer", ["adam", "momentum_sinkhorn"])
def test_hot_and_prefetched_on_ranks_with_uneven_tokens_is_synchronous_bit_for_bit(optimizer):
    config = TableConfig(optimizer=optimizer, prefetch=0)
    plain = run_ranks(uneven_run, 3, config)
    for prefetch, hot in ((1, 0), (2, 8)):
        other = run_ranks(uneven_run, 3, replace(config, prefetch=prefetch, hot_rows=hot))
        assert all(same(*reports) for reports in zip(plain, other, strict=True))
    assert plain[-1]["0"].shape[0] == 0
    assert not same(plain[0], plain[1]), "ranks own different rows"


def interrupted_run(config: TableConfig, at: int) -> dict:
    """As ``run``, but the state of step ``at`` goes into tables of their own, which know of no hot
    row.
    """
    tables = make_tables(config)
    with mock.patch.dict(globals(), STEPS=at):
        first = train(tables, 2)
    resumed = make_tables(config)
    rest = ids_of
    load(resumed, tables.state())
    with mock.patch.dict(
        globals(), STEPS=STEPS - at, ids_of=lambda step, *place: rest(step + at, *place)
    ):
        second = train(resumed, 2, first_step=at)
    outputs = {name: value for name, value in first.items() if name.isdigit()}
    late = {
        str(int(name) + len(outputs)): value for name, value in second.items() if name.isdigit()
    }
    return outputs | late | {name: value for name, value in second.items() if not name.isdigit()}


@pytest.mark.parametrize("form", ["fp32", "fp8"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_with_hot_rows_is_the_whole_run_without(optimizer, form):
    config = TableConfig(rows=form, optimizer=optimizer)
    assert same(interrupted_run(replace(config, hot_rows=16), 20), run(config, 2))


def test_without_writing_through_the_run_would_be_another():
    config = TableConfig(prefetch=0, hot_rows=16)
    with mock.patch.object(HotRows, "write_through", return_value=None):
        stale = run(config, 1)
    assert not same(stale, run(replace(config, hot_rows=0), 1))


# Rows that somebody else changes


def loaded(tables: EngramTables, other: EngramTables) -> None:
    load(tables, other.state())


def assigned(tables: EngramTables, other: EngramTables) -> None:
    for layer in SHAPES:
        tables.assign(layer, 0, other.state()[f"engram.{layer}.weight"].tensor)


@pytest.mark.parametrize("change", [loaded, assigned])
@pytest.mark.parametrize("prefetch", [0, 1])
def test_rows_that_were_loaded_are_read_anew(change, prefetch):
    config = TableConfig(prefetch=prefetch)
    tables = make_tables(replace(config, hot_rows=200))
    other = make_tables(config)
    train(tables, 1)
    everything = {layer: torch.arange(shape.num_rows)[:, None] for layer, shape in SHAPES.items()}
    look_up(tables, everything)
    assert (tables._hot._kept_SV >= 0).sum() == sum(shape.num_rows for shape in SHAPES.values())
    change(tables, other)
    for layer, rows_RW in look_up(tables, everything).items():
        assert torch.equal(rows_RW, other.state()[f"engram.{layer}.weight"].tensor)


# Which rows


def make_hot(size: int, num_rows: int) -> HotRows:
    table = torch.arange(num_rows * 2.0).view(num_rows, 2)
    return HotRows(
        size,
        num_rows,
        2,
        torch.float32,
        CPU,
        lambda rows_U: table[rows_U],
    )


def kept(hot: HotRows) -> set[int]:
    return set(hot._kept_SV.flatten().tolist()) - {-1}


def test_the_rows_asked_for_most_stay_until_others_are():
    """In one set the rows kept are those of the largest aged counts, summed here in fp64; they
    change with the uses.
    """
    uses = np.zeros(100)
    draw = np.random.default_rng(0)
    with mock.patch.object(hot_rows, "HALF_LIFE", 8):
        hot = make_hot(8, 100)
        for fetch in range(120):
            favourites = np.arange(8) * 3 + (50 if fetch >= 60 else 0)
            rows = np.unique(np.concatenate([favourites, draw.integers(0, 100, 6)]))
            values, _ = hot.ask(torch.from_numpy(rows))
            assert torch.equal(values[:, 0], torch.from_numpy(rows) * 2.0)
            uses[rows] += 2.0 ** (fetch / 8)
            if fetch % 60 > 40:
                assert kept(hot) == set(np.argsort(-uses)[:8].tolist()) == set(favourites.tolist())


def test_heat_is_the_logarithm_of_aged_uses():
    hot = make_hot(4, 30)
    uses = np.zeros(30)
    for fetch in range(400):
        rows = np.arange(0, 30, 1 + fetch % 3)
        hot.ask(torch.from_numpy(rows))
        uses[rows] += 2.0 ** (fetch / 256)
    heat = hot._heat_R.astype(float)
    stays = hot._kept_SV.flatten()
    heat[stays] = hot._heat_SV.flatten()
    assert np.log2(uses) + 64 == pytest.approx(heat, abs=1e-3)


def test_a_row_that_several_ranks_ask_for_counts_for_each():
    hot = make_hot(8, 20)
    assert hot.ask(torch.tensor([3, 5, 3, 3]))[1] == 0
    values, num_hot = hot.ask(torch.tensor([5, 3, 7, 3]))
    assert num_hot == 3
    assert values[:, 0].tolist() == [10.0, 6.0, 14.0, 6.0]


@pytest.mark.parametrize("rows", [[], [0], [19, 0, 19]])
def test_any_rows_may_be_asked_for(rows):
    hot = make_hot(1000, 20)
    for _ in range(2):
        asked = torch.tensor(rows, dtype=torch.int64)
        assert hot.ask(asked)[0].shape == (len(rows), 2)
        assert torch.equal(hot.read(asked)[:, 1], asked * 2.0 + 1)
    hot.write_through(torch.empty(0, dtype=torch.int64))


# How their use is counted


def test_use_is_of_the_fetches_accumulated_since_the_last_step():
    tables = make_tables(TableConfig(prefetch=0, hot_rows=200))
    ids = {layer: torch.arange(7)[:, None] for layer in SHAPES}
    for _ in range(
        2
    ):  # a fetch that is not trained on, as in evaluation, heats rows and is not counted
        look_up(tables, ids)
    assert tables.hot_use == (0, 0)
    wider = {layer: torch.arange(10)[:, None] for layer in SHAPES}
    for expected in ((14, 20), (34, 40)):
        rows = tables.fetch(wider)
        tables.accumulate(rows)
        assert tables.hot_use == expected
    tables.step(1e-2)
    assert tables.hot_use == (0, 0)


def shares(hot: int) -> list[tuple[tuple[int, int], float | None]]:
    quiet_libraries()
    config = tiny_config(pattern="M-")
    trainer = make_trainer(replace(config, table=replace(config.table, hot_rows=hot)))
    tables = trainer.memory.tables
    rank = trainer.mesh.rank("batch")
    size = trainer.mesh.size("batch")
    found = []
    norm = tables.squared_grad_norm
    for step in range(3):
        uses = []
        with mock.patch.object(
            tables, "squared_grad_norm", lambda uses=uses: (uses.append(tables.hot_use), norm())[1]
        ):
            result = train_step(
                trainer,
                made_up_batches(step, config, rank, size),
                1e-2,
                step,
            )
        found.append((uses[0], result.engram_hot_hits))
    return found


def test_the_share_of_a_step_is_that_of_all_ranks():
    first, second = run_ranks(shares, 2, 64)
    for one, other in zip(first, second, strict=True):
        (hot, asked), share = one
        (other_hot, other_asked), other_share = other
        assert share == other_share == pytest.approx((hot + other_hot) / (asked + other_asked))
    (hot, asked), share = first[-1]
    assert 0.1 < share < 1
    assert share != pytest.approx(hot / asked), "this rank's share alone would pass"
    assert [share for _, share in run_ranks(shares, 1, 0)[0]] == [None] * 3


# Configuration and memory


def test_wrong_configurations_are_named():
    for config in (TableConfig(hot_rows=-1), TableConfig(hot_rows=8, placement="device")):
        (problem,) = table_problems(config, WIDTH)
        assert problem.field == "table.hot_rows"
    assert table_problems(TableConfig(hot_rows=8), WIDTH) == []


@pytest.mark.parametrize(("size", "num_rows"), [(1, 100), (17, 100), (1000, 100), (8, 0)])
def test_bytes_are_those_allocated(size, num_rows):
    hot = HotRows(
        size,
        num_rows,
        WIDTH,
        torch.bfloat16,
        CPU,
        lambda rows_U: rows_U,
    )
    host = hot._heat_R.nbytes + hot._kept_SV.nbytes + hot._heat_SV.nbytes
    assert hot_bytes(size, num_rows, WIDTH, 2) == (host, hot._values.nbytes)
    assert len(hot._values) == hot_sets(size, num_rows) * 8 >= min(size, num_rows)


def test_they_are_counted_before_anything_is_allocated(tmp_path):
    rows = sum(shape.num_rows for shape in SHAPES.values())
    needed = sum(hot_bytes(16, rows, WIDTH, 4))
    config = TableConfig(
        prefetch=0,
        placement="file",
        directory=str(tmp_path),
        hot_rows=16,
    )
    for free in (needed, needed - 1):
        with mock.patch.object(storage, "free_host_bytes", return_value=free):
            if free < needed:
                with pytest.raises(RunError, match=r"table\.hot_rows.*host memory.* for hot rows"):
                    make_tables(config)
            else:
                make_tables(config)
    table = rows * (3 * 4 * WIDTH + 4)
    with mock.patch.object(storage, "free_host_bytes", return_value=table + needed - 1):
        make_tables(TableConfig(prefetch=0))
        with pytest.raises(RunError, match=r"table_size"):
            make_tables(TableConfig(prefetch=0, hot_rows=16))


def test_rows_that_are_only_read_have_no_hot_ones():
    tables = EngramTables(
        SHAPES,
        single_mesh(),
        TableConfig(hot_rows=16),
        init_std=0,
        seed=0,
        device=CPU,
        trainable=False,
    )
    assert tables._hot is None
    assert not math.isnan(
        float(look_up(tables, {layer: torch.zeros(1, 1).long() for layer in SHAPES})[1].sum())
    )
