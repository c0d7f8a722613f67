"""The CPU benchmark: its table, a run of it, and every case's result against its reference on few
tokens.
"""

import os
import subprocess
import sys

import pytest
import torch

from kernels.bench import OPS, rows_of
from kernels.bench_cpu import DTYPES, SIZE, Processor, measure
from kernels.cpu_dtype import choose_cpu_dtype
from kernels.timing import relative_error, stream_table
from tests.kernels.benchmarks import MachineWithAClock, absent, double, make_case


class TimedProcessor(MachineWithAClock, Processor):
    """p20, p50 and p80 of whatever is timed: 4, 5 and 8 ms."""


CPU = TimedProcessor(
    device="cpu",
    unit=("GFLOP/s", 1e9),
    copy_gb_s=4000.0,
    products={torch.bfloat16: 1e14, torch.float32: 2e14},
)


def test_rows_of_the_table():
    case = make_case(cpu_peers={"other": absent, "same": lambda: double})
    forward, both = rows_of(case, CPU)
    assert forward[:5] == ["double", "small: 4", "bfloat16", "forward", "5 (4-8)"]
    assert forward[5:9] == [
        "1.6e+03",
        "40%",
        "2e+05",
        "100%",
    ]  # bf16 products are slower than fp32's here
    assert forward[9:] == ["5", "reference: 5, 1.00x; other: not installed; same: 5, 1.00x"]
    assert both[3] == "forward+backward"


def test_the_reference_decides_whether_a_result_is_wrong():
    (row,) = rows_of(make_case(reference=lambda x: 3 * x), CPU)
    assert row[4] == "wrong by 3e-01: no speed"
    assert len(rows_of(make_case(exact=lambda x: 3 * x, reference=double), CPU)) == 2


def test_a_slow_peer_sits_out_and_is_compared_within_the_rounds_it_ran_in():
    assert Processor.speed_up(CPU, [9.0, 8.0], [3.0, 2.0, 100.0]) == 3.5


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__.split(".")[1])
def test_every_case_on_few_tokens(op):
    for dtype in DTYPES:
        for case in op.cases(SIZE, dtype):
            inputs = case.make(case.tiny, case.dtype, "cpu")
            results = [
                case.forward_backward(each, inputs) for each in (case.ours, CPU.oracle(case))
            ]
            assert relative_error(*results) <= case.limit, (case.op, case.shapes, case.dtype)
            assert min(case.bytes_moved) > 0


def test_rows_are_printed_as_they_come(capsys):
    def rows():
        yield ["first", "1"]
        assert capsys.readouterr().out == "| name | x |\n|------|---|\n| first | 1 |\n"
        yield ["2nd", "23"]

    stream_table(["name", "x"], rows())
    assert capsys.readouterr().out == "| 2nd   | 23 |\n"


def test_ceilings(monkeypatch):
    monkeypatch.setattr("kernels.bench_cpu.COPIED", 2**12)
    monkeypatch.setattr("kernels.bench_cpu.WIDTH", 8)
    processor = measure(1)
    assert processor.copy_gb_s > 0
    assert set(processor.products) == set(DTYPES)
    assert processor.limits().count("product") == 2


@pytest.mark.parametrize(
    "cap", [{}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=["as it is", "without bf16"]
)
def test_a_run(cap):
    """In both types, or where bf16 is slow in fp32 alone, with a word."""
    command = [sys.executable, "-m", "kernels.bench_cpu", "swiglu", "rotary", "--rounds", "1"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | cap,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| swiglu", "| rotary"))]
    is_slow = bool(cap) or choose_cpu_dtype().dtype == torch.float32
    assert len(rows) == (4 if is_slow else 8)
    assert ("bf16 is left out: " in done.stdout) == is_slow
    assert ("bfloat16" not in done.stdout) == is_slow
    assert all(row.count("reference: ") == 1 and "wrong" not in row for row in rows)
    assert "Copy" in done.stdout.splitlines()[0]
    unknown = subprocess.run(
        [sys.executable, "-m", "kernels.bench_cpu", "nothing"], capture_output=True, text=True
    )
    assert "unknown op nothing: use" in unknown.stderr
