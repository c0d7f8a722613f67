"""What is said of a rank's bytes is what its tables allocate, in every memory."""

import os
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.engram_table import EngramTables, RowLayout, TableConfig, TableShape
from parallel.table_bytes import TableBytes, rows_of_rank, table_bytes
from tests.helpers.ranks import run_ranks
from tests.helpers.table_rows import make_mesh

SHAPES = {1: TableShape(211, 32), 4: TableShape(103, 32)}
LAYER_ROWS = [shape.num_rows for shape in SHAPES.values()]


def hot_nbytes(tables: EngramTables) -> int:
    hot = tables._hot
    if hot is None:
        return 0
    arrays = (hot._heat_R, hot._kept_SV, hot._heat_SV, hot._values)
    return sum(array.nbytes for array in arrays)


def allocated_and_said(config: TableConfig) -> tuple[int, int, int, TableBytes]:
    """Bytes of rows and state, of hot rows, and of files; and what was said of this rank."""
    mesh = make_mesh()
    files = []
    allocate = os.posix_fallocate

    def recorded(descriptor: int, offset: int, size: int) -> None:
        files.append(size)
        allocate(descriptor, offset, size)

    with mock.patch.object(os, "posix_fallocate", recorded):
        tables = EngramTables(
            SHAPES,
            mesh,
            config,
            init_std=0.1,
            seed=0,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
        )
    said = table_bytes(
        config,
        rows_of_rank(LAYER_ROWS, mesh.rank("engram"), mesh.size("engram")),
        32,
        value_bytes=2,
        on_card=False,
    )
    rows = sum(piece.tensor.nbytes for piece in tables.state().values())
    return rows, hot_nbytes(tables), sum(files), said


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adam", "momentum_sinkhorn"])
@pytest.mark.parametrize(("placement", "hot"), [("host", 0), ("host", 19), ("file", 19)])
def test_allocated_is_what_was_said(form, optimizer, placement, hot, tmp_path):
    config = TableConfig(
        prefetch=0,
        rows=form,
        optimizer=optimizer,
        placement=placement,
        directory=str(tmp_path),
        hot_rows=hot,
    )
    rows, hot_rows, files, said = allocated_and_said(config)
    in_files = placement == "file"
    assert (said.rows_on_host, said.rows_on_device) == (0 if in_files else rows, 0)
    assert said.disk == files == (rows if in_files else 0)
    assert (said.hot_on_host, said.hot_on_device) == (hot_rows, 0)
    assert said.host == (0 if in_files else rows) + hot_rows


def test_rows_on_the_device_are_said_of_the_device():
    config = TableConfig(prefetch=0, placement="device")
    rows, _, _, said = allocated_and_said(config)
    assert (said.host, said.device, said.disk) == (0, rows, 0)


def test_on_a_card_hot_rows_are_the_cards_and_their_counts_the_hosts():
    options = {"num_rows": 100, "width": 32, "value_bytes": 2}
    config = TableConfig(hot_rows=16)
    on_card = table_bytes(config, **options, on_card=True)
    on_cpu = table_bytes(config, **options, on_card=False)
    assert on_card.hot_on_host == 4 * 100 + 12 * 16
    assert on_card.hot_on_device == 16 * 32 * 2
    assert on_cpu.hot_on_host == on_card.hot_on_host + on_card.hot_on_device
    assert on_cpu.rows_on_host == on_card.rows_on_host == 100 * (3 * 4 * 32 + 4)


def test_rows_that_are_only_read_have_neither_state_nor_hot_rows():
    config = TableConfig(rows="bf16", hot_rows=16)
    said = table_bytes(config, 100, 32, value_bytes=2, on_card=False, trainable=False)
    assert (said.host, said.device, said.disk) == (100 * 32 * 2, 0, 0)


def test_every_rank_allocates_what_was_said():
    config = TableConfig(prefetch=0, hot_rows=8)
    for rows, hot_rows, _, said in run_ranks(allocated_and_said, 3, config):
        assert (said.rows_on_host, said.hot_on_host) == (rows, hot_rows)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3), st.integers(1, 40))
def test_ranks_share_all_rows_as_the_layout_does(layer_rows, ranks):
    shapes = {layer: TableShape(rows, 4) for layer, rows in enumerate(layer_rows)}
    layout = RowLayout(shapes, ranks)
    mine = [rows_of_rank(layer_rows, rank, ranks) for rank in range(ranks)]
    assert mine == layout.local_rows
    assert sum(mine) == sum(layer_rows)
