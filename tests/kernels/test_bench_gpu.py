"""The GPU benchmark without a card: its table, its dry run, and the sweep of launch constants."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kernels.bench import rows_of
from kernels.bench_gpu import Card
from kernels.cases import sweep_constants
from tests.kernels.benchmarks import MachineWithAClock, make_case


class TimedCard(MachineWithAClock, Card):
    """p20, p50 and p80 of whatever is timed: 4, 5 and 8 ms."""

    def memory(self, run):
        run()
        return ["0.50"]


@pytest.fixture
def card(monkeypatch):
    """4 TB/s, 800 TFLOP/s; what goes through torch.compile is not compiled."""
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fn)
    products = {torch.bfloat16: 800e12, torch.float32: 50e12}
    return TimedCard(
        device="cpu",
        unit=("TFLOP/s", 1e12),
        copy_gb_s=4000.0,
        products=products,
    )


def test_rows_of_the_table(card):
    forward, both = rows_of(make_case(), card)
    assert forward[:5] == ["double", "small: 4", "bfloat16", "forward", "5 (4-8)"]
    assert forward[5:9] == ["1.6e+03", "40%", "200", "25%"]  # of 8 GB and 1 TFLOP in 5 ms
    assert forward[9:11] == ["2", "0.50"]  # 8 GB at 4 TB/s take longer than 1 TFLOP at 800 TFLOP/s
    assert both[3] == "forward+backward"
    assert both[9] == "10"  # 8 TFLOP at 800 TFLOP/s take longer than 16 GB
    peers = "torch.compile: 5, 1.00x; peer: 5, 1.00x; other: not installed; third: RuntimeError"
    assert [forward[-1], both[-1]] == [peers, peers]


def test_a_wrong_result_prints_no_speed(card):
    for wrong in (lambda x: 2.1 * x, lambda x: x / 0):
        (row,) = rows_of(make_case(ours=wrong), card)
        assert row[4].startswith("wrong by")
        assert not any(row[5:])


def test_an_op_without_gradients_has_one_row(card):
    case = make_case(make=lambda count, dtype, _: [torch.ones(count)])
    assert [row[3] for row in rows_of(case, card)] == ["forward"]


def test_a_case_in_fp32_has_fp32s_ceiling(card):
    forward, _ = rows_of(make_case(dtype=torch.float32), card)
    assert forward[7:10] == ["200", "400%", "20"]  # 1 TFLOP at 50 TFLOP/s


def run(*ops):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.bench_gpu", *ops]
    return subprocess.run(
        command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )


def test_dry_run():
    done = run("swiglu", "state_update")
    assert done.returncode == 0, done.stderr
    rows = [
        line for line in done.stdout.splitlines() if line.startswith(("| swiglu", "| state_update"))
    ]
    assert len(rows) == 4
    assert all(row.count("not measured") == 2 for row in rows)
    assert "unknown op nothing: use" in run("nothing").stderr


def test_sweep_shows_the_best_first_and_puts_the_constants_back(monkeypatch, capsys):
    launchers = SimpleNamespace(TILE=4, ROWS=1)

    def timed(run):
        run()
        return abs(launchers.TILE - 8) + launchers.ROWS

    monkeypatch.setattr("triton.testing.do_bench", timed)
    sweep_constants(
        launchers,
        [make_case()],
        TILE=(4, 8, 16),
        ROWS=(1, 2),
    )
    best, second = [line.split("|")[2:4] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [*map(int, best), *map(int, second)] == [8, 1, 8, 2]
    assert vars(launchers) == {"TILE": 4, "ROWS": 1}
