"""Memories of rows: what they take, what a file holds, what cannot be had."""

import errno
import mmap
import os
import resource
import socket

import pytest
import torch
import torch.distributed as dist

from parallel.engram_table import TableConfig, TableShape
from parallel.errors import RunError
from parallel.mesh import single_mesh
from parallel.table_bytes import row_bytes, state_bytes
from tests.helpers.ranks import run_ranks
from tests.helpers.table_rows import FORMATS, make_tables, train


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adam", "momentum_sinkhorn"])
def test_bytes_a_row_are_those_allocated(form, optimizer):
    config = TableConfig(prefetch=0, rows=form, optimizer=optimizer)
    pieces = make_tables(TableShape(10, 64), config).state()
    allocated = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces.values())
    assert allocated == 10 * (row_bytes(form, 64) + state_bytes(optimizer, 64))


@pytest.mark.parametrize("form", FORMATS)
def test_rows_in_a_file_are_rows_in_memory(form, tmp_path):
    states = []
    for placement in ("host", "file"):
        config = TableConfig(
            prefetch=0,
            rows=form,
            placement=placement,
            directory=str(tmp_path),
        )
        tables = make_tables(TableShape(50, 64), config)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            train(
                tables,
                torch.arange(0, 50, step + 1),
                torch.randn(len(range(0, 50, step + 1)), 64, generator=generator),
                step,
            )
        states.append(tables.state())
    for name, piece in states[0].items():
        assert torch.equal(piece.tensor, states[1][name].tensor), name
    assert os.listdir(tmp_path) == []


def test_a_file_that_does_not_fit_is_refused_before_it_is_mapped(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = TableConfig(prefetch=0, placement="file", directory=str(tmp_path))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        with pytest.raises(RunError, match=r"table\.directory.*cannot hold"):
            make_tables(TableShape(5000, 64), config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(RunError, match="not a directory"):
        make_tables(
            TableShape(5, 64),
            TableConfig(prefetch=0, placement="file", directory=str(tmp_path / "no")),
        )
    with pytest.raises(RunError, match=r"disk at .* for rows"):
        make_tables(TableShape(2**40, 64), config)


@pytest.mark.parametrize(
    ("function", "number", "told"),
    [
        ("posix_fallocate", errno.ENOSPC, "No space left on device"),
        ("open", errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_refuses_is_told_before_anything_is_mapped(
    function, number, told, tmp_path, monkeypatch
):
    def refuse(*arguments, **named):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mmap, "mmap", None)
    config = TableConfig(prefetch=0, placement="file", directory=str(tmp_path))
    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(RunError) as error:
        make_tables(TableShape(5000, 64), config)
    monkeypatch.undo()
    assert f"table.directory={tmp_path} cannot hold 1,280,000 bytes: {told}" in str(error.value)
    assert os.listdir(tmp_path) == []


def refused_on_the_last_rank(directory: str, lost: bool) -> str:
    """What a rank is told when the last one's disk is full, or its directory is not there."""
    last = dist.get_rank() == dist.get_world_size() - 1

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if last and not lost:
        os.posix_fallocate = refuse
    config = TableConfig(
        prefetch=0, placement="file", directory=directory + "/lost" * (last and lost)
    )
    try:
        make_tables(TableShape(50, 64), config)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("lost", "told"), [(False, "No space left on device"), (True, "lost is not a directory")]
)
def test_what_one_rank_cannot_have_is_told_by_all(lost, told, tmp_path):
    first, *others = run_ranks(refused_on_the_last_rank, 3, str(tmp_path), lost)
    assert told in first
    assert f"(on {socket.gethostname()})" in first
    assert others == [first, first]


def test_single_mesh_has_one_owner():
    assert single_mesh().size("engram") == 1
