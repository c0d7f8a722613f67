"""Free memory under control groups of both versions, on trees of files."""

import subprocess
import sys

import pytest

from parallel.free_memory import free_host_bytes

GIB = 2**30


def make_root(tmp_path, cgroup: str, groups: dict[str, dict[str, str]], available: int = 8000):
    """A root whose kernel calls ``available`` KiB free; an empty ``cgroup`` is a missing file."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9000 kB\nMemAvailable:    {available} kB\n")
    if cgroup:
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for path, files in groups.items():
        folder = tmp_path / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    return tmp_path


def v2(limit: str | int, usage: int, cache: int) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{usage}\n",
        "memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


def v1(limit: int, usage: int, cache: int) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_inactive_file {cache}\n"
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage}\n",
        "memory.stat": stat,
    }


def without_stat(group: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in group.items() if name != "memory.stat"}


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        (
            "0::/a/b\n",
            {"a/b": v2("max", 1, 0), "a": v2("5000", 1000, 200)},
            4200,
        ),  # the parent binds
        ("0::/a/b\n", {"a/b": v2("3000", 1000, 0), "a": v2("5000", 1000, 0)}, 2000),
        (
            "0::/elsewhere\n",
            {"": v2("7000", 1000, 0)},
            6000,
        ),  # a container sees its own group at the mount
        ("0::/a\n", {"a": v2("100", 300, 0)}, 0),
        (
            "5:cpu:/x\n4:memory:/x/y\n0::/\n",
            {"memory/x/y": v1(2**63 - 4096, 10, 0), "memory/x": v1(900, 500, 7)},
            407,
        ),
        ("0::/\n", {}, 8000 * 1024),
        ("0::/\n", {"": v2("max", 1, 0)}, 8000 * 1024),
        # no membership is told: the mounts are asked
        ("", {}, 8000 * 1024),
        ("", {"": without_stat(v2(500_000, 100_000, 0))}, 400_000),
        ("", {"": without_stat(v2("max", 1, 0))}, 8000 * 1024),
        ("", {"memory": without_stat(v1(9_223_372_036_854_771_712, 5, 0))}, 8000 * 1024),
        ("", {"memory": v1(500_000, 100_000, 1000)}, 401_000),
    ],
)
def test_free_memory_is_the_least_of_all_limits(tmp_path, cgroup, groups, expected):
    assert free_host_bytes(make_root(tmp_path, cgroup, groups)) == expected


def test_a_containers_reclaimable_cache_is_free(tmp_path):
    """32 GiB, 30 of them used, 27 of those by files that nobody reads any more."""
    container = v2(32 * GIB, 30 * GIB, 27 * GIB)
    root = make_root(tmp_path, "0::/\n", {"": container}, available=60 * 2**20)
    assert free_host_bytes(root) == 29 * GIB


def test_a_nested_groups_limit_binds(tmp_path):
    """8 GiB inside a machine of which 60 GiB are free; the mount itself has no limit."""
    groups = {"jobs": v2("max", 9 * GIB, 0), "jobs/ours": v2(8 * GIB, GIB, 0)}
    root = make_root(tmp_path, "0::/jobs/ours\n", groups, available=60 * 2**20)
    assert free_host_bytes(root) == 7 * GIB


def test_free_memory_unknown_without_proc(tmp_path):
    assert free_host_bytes(tmp_path) is None


def test_free_memory_unknown_where_the_kernel_does_not_tell_it(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\n")
    assert free_host_bytes(tmp_path) is None


def test_this_machine_has_memory():
    assert free_host_bytes() > 2**20


def test_asking_imports_no_torch():
    program = (
        "import sys, parallel.free_memory as m; m.free_host_bytes(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
