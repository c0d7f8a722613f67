"""Refusal of tables that do not fit; memory that is taken once it is touched; pages that are
locked.
"""

import gc
import resource
import socket
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel import host_memory as memory
from parallel.engram_table import EngramTables, TableConfig, TableShape, storage
from parallel.errors import RunError
from parallel.host_memory import GIB, check_memory, host_zeros, locked_zeros
from parallel.mesh import Mesh, single_mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh
from tests.helpers.ranks import run_ranks
from tests.helpers.table_use import look_up
from tests.parallel.engram_table import test_hot_rows as hot


def test_tables_beyond_memory_are_refused_before_allocation():
    shapes = {1: TableShape(10**12, 64)}
    with pytest.raises(RunError) as error:
        EngramTables(
            shapes, single_mesh(), TableConfig(), init_std=0.02, seed=0, device=torch.device("cpu")
        )
    (problem,) = error.value.problems
    assert problem.field == "model.engram.table_size"
    assert (
        f"needs {10**12 * (3 * 64 * 4 + 4) / GIB:.2f} GiB of host memory on {socket.gethostname()}"
        in str(problem)
    )
    assert "GiB are available" in str(problem)


def test_memory_that_is_free_and_refused_is_told():
    """As under ``ulimit -v``, or where the kernel does not overcommit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    try:
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, hard))
        with pytest.raises(
            RunError,
            match=r"table_size=.* cannot have 2,147,483,648 bytes of host memory: Cannot all",
        ):
            EngramTables(
                {1: TableShape(2**23, 64)},
                single_mesh(),
                TableConfig(),
                init_std=0,
                seed=0,
                device=torch.device("cpu"),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_what_is_missing_on_a_small_disk_is_told_in_bytes(tmp_path):
    full = mock.Mock(free=30_000)
    with (
        mock.patch.object(storage.shutil, "disk_usage", return_value=full),
        pytest.raises(RunError) as error,
    ):
        EngramTables(
            {1: TableShape(50, 64)},
            single_mesh(),
            TableConfig(placement="file", directory=str(tmp_path)),
            init_std=0.02,
            seed=0,
            device=torch.device("cpu"),
        )
    (problem,) = error.value.problems
    assert f"needs 38,600 bytes of disk at {tmp_path} on" in problem.rule
    assert "30,000 bytes are available" in problem.rule
    assert "another table.directory" in problem.fix


def check_on_ranks(needed: list[int], available: list[int | None]) -> str:
    rank = dist.get_rank()
    size = dist.get_world_size()
    mesh = Mesh(
        plan_mesh(ParallelConfig(), size), rank, MappingProxyType({"engram": dist.group.WORLD})
    )
    try:
        check_memory(
            needed[rank],
            available[rank],
            "host memory",
            "9 rows x 4",
            mesh,
        )
    except RunError as error:
        return str(error)
    return ""


def test_ranks_of_a_node_share_its_memory():
    assert run_ranks(
        check_on_ranks,
        2,
        [GIB, 2 * GIB],
        [4 * GIB, 3 * GIB],
    ) == ["", ""]
    first, second = run_ranks(
        check_on_ranks,
        2,
        [GIB, 2 * GIB],
        [4 * GIB, int(2.5 * GIB)],
    )
    assert first == second
    assert "needs 3.00 GiB" in first
    assert "2.50 GiB are available" in first
    assert run_ranks(check_on_ranks, 2, [GIB, 2 * GIB], [None, None]) == ["", ""]


@pytest.mark.parametrize("shape", [(1000, 7), (0, 4), (3,)])
def test_host_zeros(shape):
    tensor = host_zeros(shape, torch.float32)
    assert torch.equal(tensor, torch.zeros(shape))
    tensor += 1
    assert torch.equal(tensor, torch.ones(shape))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_host_zeros_take_memory_once_they_are_touched():
    """So the thread that fills rows, or updates their state for the first time, decides on which
    NUMA node they are.
    """
    before = resident_bytes()
    tensor = host_zeros((64, 2**20), torch.float32)
    assert resident_bytes() - before < 2**24
    tensor[:32] += 1
    assert 2**27 - 2**24 < resident_bytes() - before < 2**27 + 2**25


# Locked pages


class Locks:
    """In place of CUDA: which pages are locked, and whether they are still mapped when they are
    unlocked.
    """

    def __init__(self, error: str = "") -> None:
        self.locked: dict[int, int] = {}
        self.error = error

    def lock(self, address: int, num_bytes: int) -> None:
        if self.error:
            raise RuntimeError(self.error)
        self.locked[address] = num_bytes

    def unlock(self, address: int) -> None:
        ranges = [
            line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
        ]
        assert any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges), (
            "unmapped before unlocked"
        )
        del self.locked[address]

    def patched(self):
        return mock.patch.multiple(memory, lock_pages=self.lock, unlock_pages=self.unlock)


def test_locked_zeros_are_locked_at_their_size_as_long_as_they_live():
    locks = Locks()
    with locks.patched():
        tensor = locked_zeros((1000, 7), torch.float32)
        assert locks.locked == {tensor.data_ptr(): 28_000}
        assert torch.equal(tensor, torch.zeros(1000, 7))
        part = tensor[5:]
        del tensor
        gc.collect()
        assert locks.locked
        del part
        gc.collect()
        assert not locks.locked
        assert locked_zeros((0, 4), torch.float32).shape == (0, 4)
        assert not locks.locked


def pinned_tables(device: torch.device, **options) -> EngramTables:
    config = TableConfig(placement="pinned", prefetch=0)
    return EngramTables(
        {1: TableShape(50, 8)}, single_mesh(), config, init_std=1, seed=0, device=device, **options
    )


def test_pages_are_locked_for_a_card_only():
    refused = mock.Mock(side_effect=AssertionError("allocated"))
    with (
        mock.patch.multiple(storage, host_zeros=refused, locked_zeros=refused),
        pytest.raises(RunError) as error,
    ):
        pinned_tables(torch.device("cpu"))
    (problem,) = error.value.problems
    assert (problem.field, problem.value, problem.fix) == (
        "table.placement",
        "pinned",
        'use "host"',
    )
    assert "needs a CUDA device" in problem.rule
    tables = pinned_tables(torch.device("cpu"), trainable=False)
    rows = look_up(tables, {1: torch.zeros(3, 1, dtype=torch.int64)})
    assert torch.equal(rows[1], torch.zeros(3, 8))


def test_pages_that_cannot_be_locked_are_refused():
    with (
        Locks("out of memory (2)").patched(),
        pytest.raises(RunError, match=r"table\.placement.*256 bytes: out of mem"),
    ):
        storage.pinned_zeros((8, 8), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card_every_placement_gives_the_same_bits(dtype, tmp_path):
    """The table's stream beside a busy one: rows, patches and gradients that came too early would
    be others.
    """
    device = torch.device("cuda", 0)
    matrix = torch.randn(4096, 4096, device=device)

    def busy() -> None:
        for _ in range(4):
            torch.mm(matrix, matrix)

    base = TableConfig(rows="bf16" if dtype == torch.bfloat16 else "fp32", directory=str(tmp_path))
    reports = []
    for prefetch, hot_rows, placement in (
        (0, 0, "host"),
        (1, 0, "host"),
        (0, 16, "host"),
        (2, 16, "pinned"),
        (1, 0, "pinned"),
        (1, 16, "file"),
        (1, 0, "device"),
        (0, 0, "device"),
    ):
        config = replace(
            base,
            prefetch=prefetch,
            hot_rows=hot_rows,
            placement=placement,
        )
        tables = hot.make_tables(config, device, dtype)
        if placement == "pinned":
            assert tables._store.weight.is_pinned()
        reports.append(hot.train(tables, 2, busy))
    first = [
        np.array_equal(report[str(n)], reports[0][str(n)]) for report in reports for n in range(4)
    ]
    assert all(first), "before any update resident rows are those of the host"
    resident = reports[-2:]  # updated by tensor operations, not by the host's loops
    assert all(hot.same(report, reports[0]) for report in reports[1:-2])
    assert hot.same(*resident)
