"""Cores that control groups of both versions leave, on trees of files."""

import os

from launch.machine import cores


def write(root, **files):
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_no_control_group(tmp_path):
    assert cores(tmp_path) == len(os.sched_getaffinity(0))


def test_version_2(tmp_path):
    write(tmp_path, cpu_dot_max="100000 100000\n")
    assert cores(tmp_path) == 1


def test_version_2_without_limits(tmp_path):
    write(tmp_path, cpu_dot_max="max 100000\n")
    assert cores(tmp_path) == len(os.sched_getaffinity(0))


def test_version_1(tmp_path):
    write(tmp_path, cpu__cpu_dot_cfs_quota_us="-1\n", cpu__cpu_dot_cfs_period_us="100000\n")
    assert cores(tmp_path) == len(os.sched_getaffinity(0))
    write(tmp_path, cpu__cpu_dot_cfs_quota_us="50000\n")
    assert cores(tmp_path) == 1
