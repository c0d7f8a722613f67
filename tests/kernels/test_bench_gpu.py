"""The GPU benchmark without a card: its table, its dry run, and the sweep of launch constants."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kernels import bench_gpu
from kernels.bench_gpu import Ceilings, rows_of
from kernels.cases import Case, sweep_constants

CEILINGS = Ceilings(copy_gb_s=4000.0, matmul_tflop_s=800.0)


def double(x):
    return 2 * x


def absent():
    raise ImportError("not here")


def broken():
    raise RuntimeError("no kernel image")


def make_case(**changed):
    """Forward moves 8 GB and does 1 TFLOP, with backward 16 GB and 8 TFLOP."""
    fields = {
        "op": "double", "shapes": "small: 4", "make": lambda count, dtype, _: [torch.ones(count).requires_grad_()],
        "full": 4, "tiny": 2, "ours": double, "exact": lambda x: x + x, "bytes_moved": (8 * 10**9, 16 * 10**9),
        "flops": (10**12, 8 * 10**12), "peers": {"peer": lambda: double, "other": absent, "third": broken},
    }  # fmt: skip
    return Case(**fields | changed)


@pytest.fixture
def clock(monkeypatch):
    """p20, p50 and p80 of whatever is timed: 4, 5 and 8 ms; peers through torch.compile are not compiled."""
    monkeypatch.setattr(bench_gpu, "_quantiles", lambda run: [4.0, 5.0, 8.0] if run() is not None else [])
    monkeypatch.setattr(bench_gpu, "_peak_gib", lambda run: 0.5)
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fn)


@pytest.mark.usefixtures("clock")
def test_rows_of_the_table():
    forward, both = rows_of(make_case(), CEILINGS)
    assert forward[:4] == ["double", "small: 4", "forward", "5 (4-8)"]
    assert forward[4:8] == ["1600", "40%", "200.0", "25%"]  # of 8 GB and 1 TFLOP in 5 ms
    assert forward[8:10] == ["2", "0.50"]  # 8 GB at 4 TB/s take longer than 1 TFLOP at 800 TFLOP/s
    assert both[2] == "forward+backward"
    assert both[8] == "10"  # 8 TFLOP at 800 TFLOP/s take longer than 16 GB
    peers = "torch.compile: 5, 1.00x; peer: 5, 1.00x; other: not installed; third: RuntimeError"
    assert [forward[-1], both[-1]] == [peers, peers]


@pytest.mark.usefixtures("clock")
def test_a_wrong_result_prints_no_speed():
    for wrong in (lambda x: 2.1 * x, lambda x: x / 0):
        (row,) = rows_of(make_case(ours=wrong), CEILINGS)
        assert row[3].startswith("wrong by")
        assert not any(row[4:])


@pytest.mark.usefixtures("clock")
def test_an_op_without_gradients_has_one_row():
    case = make_case(make=lambda count, dtype, _: [torch.ones(count)])
    assert [row[2] for row in rows_of(case, CEILINGS)] == ["forward"]


def run(*ops):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.bench_gpu", *ops]
    return subprocess.run(command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)


def test_dry_run():
    done = run("swiglu", "state_update")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| swiglu", "| state_update"))]
    assert len(rows) == 4
    assert all(row.count("not measured") == 2 for row in rows)
    assert "unknown op nothing: use" in run("nothing").stderr


def test_sweep_shows_the_best_first_and_puts_the_constants_back(monkeypatch, capsys):
    launchers = SimpleNamespace(TILE=4, ROWS=1)

    def timed(run):
        run()
        return abs(launchers.TILE - 8) + launchers.ROWS

    monkeypatch.setattr("triton.testing.do_bench", timed)
    sweep_constants(launchers, [make_case()], TILE=(4, 8, 16), ROWS=(1, 2))
    best, second = [line.split("|")[2:4] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [*map(int, best), *map(int, second)] == [8, 1, 8, 2]
    assert vars(launchers) == {"TILE": 4, "ROWS": 1}
