"""The doctor, alone and under the launchers."""

import re
import sys

import pytest

from launch import doctor
from launch.doctor import check_communication, check_node, check_versions, show
from launch.env import Process
from tests.helpers.runs import LOCAL
from tests.launch.commands import BIN, launch, run


def test_alone():
    done = launch("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python, 1 processes" in done.stdout
    assert re.search(r"^ok +compute type +(bf16|fp32): \w+", done.stdout, re.MULTILINE)
    assert "all-reduce and all-to-all between 2 processes" in done.stdout


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ("torchrun", [sys.executable, "-m", "torch.distributed.run", *LOCAL, "2"]),
        (
            "mpirun",
            [
                str(BIN / "mpirun"),
                "--allow-run-as-root",
                "--oversubscribe",
                "-n",
                "2",
                sys.executable,
            ],
        ),
    ],
)
def test_checks_the_started_processes(launcher, command):
    done = run(*command, "-m", "launch", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{launcher}, 2 processes, 2 on this node") == 1
    assert done.stdout.count("all-reduce and all-to-all between 2 processes") == 1


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(doctor, "versions", lambda: {"torch": None, "mpi4py": None, "numpy": "2.0"})
    assert [(f.status, f.subject) for f in check_versions()] == [
        ("problem", "torch"),
        ("warning", "mpi4py"),
        ("ok", "numpy"),
    ]


@pytest.mark.parametrize(("card", "status"), [(False, "ok"), (True, "warning")])
def test_only_cards_need_triton(card, status, monkeypatch):
    monkeypatch.setattr(doctor, "versions", lambda: {"triton": None})
    monkeypatch.setattr(doctor, "has_cuda", lambda: card)
    assert [finding.status for finding in check_versions()] == [status]


def test_a_crowded_node(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    monkeypatch.setattr(doctor, "free_host_bytes", lambda: 2**30)
    room = doctor.shutil.disk_usage(tmp_path)._replace(free=2**40)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: room)
    findings = {
        f.subject: f
        for f in check_node(Process(world_size=4, local_world_size=4), shm=tmp_path / "none")
    }
    assert [name for name, f in findings.items() if f.status == "warning"] == [
        "cores",
        "memory",
        "/dev/shm",
    ]
    show(list(findings.values()))
    assert "-> docker run --shm-size=8g" in capsys.readouterr().out


def test_memory_that_the_system_does_not_tell_is_no_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "free_host_bytes", lambda: None)
    (memory,) = (f for f in check_node(Process(), shm=tmp_path) if f.subject == "memory")
    assert (memory.status, memory.found) == ("ok", "unknown: this system does not tell it")


def test_a_peer_that_does_not_come_is_a_problem(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(doctor.free_port()))
    finding = check_communication(Process(rank=0, world_size=2), timeout_s=1)
    assert finding.status == "problem"
    assert finding.found.startswith("rank 0:")
