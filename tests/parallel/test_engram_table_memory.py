"""Free memory under control groups of both versions; refusal of tables that do not fit."""

import socket
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist

from parallel.engram_table import EngramTables, TableConfig, TableShape
from parallel.engram_table.memory import GIB, available_host_bytes, check_memory, host_zeros
from parallel.errors import RunError
from parallel.mesh import Mesh, single_mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh
from tests.ranks import run_ranks


def make_root(tmp_path, cgroup: str, groups: dict[str, dict[str, str]]):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for path, files in groups.items():
        folder = tmp_path / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    return tmp_path


def v2(limit: str, usage: int, cache: int) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{usage}\n",
        "memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


def v1(limit: int, usage: int, cache: int) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_inactive_file {cache}\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{usage}\n", "memory.stat": stat}


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        ("0::/a/b\n", {"a/b": v2("max", 1, 0), "a": v2("5000", 1000, 200)}, 4200),  # the parent binds
        ("0::/a/b\n", {"a/b": v2("3000", 1000, 0), "a": v2("5000", 1000, 0)}, 2000),
        ("0::/elsewhere\n", {"": v2("7000", 1000, 0)}, 6000),  # a container sees its own group at the mount
        ("0::/a\n", {"a": v2("100", 300, 0)}, 0),
        ("5:cpu:/x\n4:memory:/x/y\n0::/\n", {"memory/x/y": v1(2**63 - 4096, 10, 0), "memory/x": v1(900, 500, 7)}, 407),
        ("0::/\n", {}, 8000 * 1024),
    ],
)
def test_free_memory_is_the_least_of_all_limits(tmp_path, cgroup, groups, expected):
    assert available_host_bytes(make_root(tmp_path, cgroup, groups)) == expected


def test_free_memory_unknown_without_proc(tmp_path):
    assert available_host_bytes(tmp_path) is None


def test_this_machine_has_memory():
    assert available_host_bytes() > 2**20


def test_tables_beyond_memory_are_refused_before_allocation():
    shapes = {1: TableShape(10**12, 64)}
    with pytest.raises(RunError) as error:
        EngramTables(shapes, single_mesh(), TableConfig(), init_std=0.02, seed=0, device=torch.device("cpu"))
    (problem,) = error.value.problems
    assert problem.field == "model.engram.table_size"
    assert f"needs {10**12 * (3 * 64 * 4 + 4) / GIB:.2f} GiB of host memory on {socket.gethostname()}" in str(problem)
    assert "GiB are available" in str(problem)


def check_on_ranks(needed: list[int], available: list[int | None]) -> str:
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = Mesh(plan_mesh(ParallelConfig(), size), rank, MappingProxyType({"engram": dist.group.WORLD}))
    try:
        check_memory(needed[rank], available[rank], "host memory", "9 rows x 4", mesh)
    except RunError as error:
        return str(error)
    return ""


def test_ranks_of_a_node_share_its_memory():
    assert run_ranks(check_on_ranks, 2, [GIB, 2 * GIB], [4 * GIB, 3 * GIB]) == ["", ""]
    first, second = run_ranks(check_on_ranks, 2, [GIB, 2 * GIB], [4 * GIB, int(2.5 * GIB)])
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
