"""Limits of control groups, of both versions, on trees of files."""

import os

import pytest

from launch.machine import cores, free_memory


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    return tmp_path


def write(root, **files):
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_no_control_group(root):
    assert free_memory(root) == 1000 * 1024
    assert cores(root) == len(os.sched_getaffinity(0))


def test_version_2(root):
    write(
        root,
        memory_dot_max="500000\n",
        memory_dot_current="100000\n",
        cpu_dot_max="100000 100000\n",
    )
    assert free_memory(root) == 400_000
    assert cores(root) == 1


def test_version_2_without_limits(root):
    write(
        root,
        memory_dot_max="max\n",
        memory_dot_current="1\n",
        cpu_dot_max="max 100000\n",
    )
    assert free_memory(root) == 1000 * 1024
    assert cores(root) == len(os.sched_getaffinity(0))


def test_version_1(root):
    write(
        root,
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        memory__memory_dot_usage_in_bytes="5\n",
    )
    write(root, cpu__cpu_dot_cfs_quota_us="-1\n", cpu__cpu_dot_cfs_period_us="100000\n")
    assert free_memory(root) == 1000 * 1024
    assert cores(root) == len(os.sched_getaffinity(0))
    write(root, cpu__cpu_dot_cfs_quota_us="50000\n")
    assert cores(root) == 1
