"""The benchmark of Engram tables on a card, without one: its dry run, its check, its figures."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from parallel.engram_table import EngramTables
from parallel.engram_table.hot_rows import HotRows
from parallel.errors import RunError
from training.bench import engram as bench_engram
from training.bench.engram import (
    HEAD,
    RESIDENT,
    Result,
    bench,
    check_placements,
    copied_in,
    placements,
    table,
)
from training.bench.engram_loop import Loop, Work
from training.presets import PRESETS

RUN = PRESETS[bench_engram.PRESET]()
FEW = replace(
    RUN, model=replace(RUN.model, engram=replace(RUN.model.engram, table_size=50, head_dim=16))
)
NAMES = list(placements(100))


def make_work(**changed) -> Work:
    return replace(
        Work(
            run=FEW,
            device=torch.device("cpu"),
            tokens=24,
            micro_batches=2,
            side=8,
            products=6,
        ),
        **changed,
    )


def run_main(*arguments, absent):
    """The command on a machine without a card, where some packages are not installed."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); sys.argv[1:] = "
        f"{arguments!r}; "
        "from training.bench.engram import main; main()"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_dry_run_needs_torch_triton_and_numba_only():
    done = run_main(absent=("deepspeed", "megatron", "xxhash", "transformers", "datasets"))
    assert done.returncode == 0, done.stderr
    assert "No CUDA device: placements are checked, and no speed is measured." in done.stdout
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in done.stdout.splitlines()
        if line[:1] == "|"
    ]
    assert rows[0] == HEAD
    assert rows[2][:3] == ["no table", "", "not measured"]
    assert [row[:2] for row in rows[3:]] == [
        [name, form] for form in ("fp32", "bf16") for name in NAMES
    ]
    for row in rows[3:]:
        assert row[2:9] == ["not measured"] * 7
        assert 50 < float(row[9]) < 100
        assert (float(row[10]) > 0) == ("hot" in row[0])


def test_without_numba_one_line_says_so():
    done = run_main(absent=("numba",))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "training.bench.engram needs numba: pip install numba\n"


@pytest.mark.parametrize(
    "arguments", [("--steps", "0"), ("--compute-ms", "nan"), ("--tokens", "-1")]
)
def test_arguments_must_be_positive(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_engram", *arguments])
    with pytest.raises(SystemExit) as stop:
        bench_engram.main()
    assert stop.value.code == 2
    assert f"{arguments[0]}: got" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_placement_that_leaves_other_bits_prints_no_speed(name, monkeypatch, capsys):
    make = Work.tables

    def perturbed(work, config):
        tables = make(work, config)
        if config == placements(work.num_rows)[name]:
            weight = tables.state()["engram.10.weight"].tensor
            weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(1.0, dtype=weight.dtype))
        return tables

    check_placements(make_work())
    monkeypatch.setattr(Work, "tables", perturbed)
    monkeypatch.setattr(sys, "argv", ["bench_engram", "--tiny"])
    with pytest.raises(SystemExit) as stop:
        bench_engram.main()
    first = NAMES[1] if name == RESIDENT else name  # all others differ from the one that is first
    assert (
        stop.value.code
        == f"wrong: {first}, fp32: engram.10.weight differs from that of rows {RESIDENT}; no speed"
    )
    assert "|" not in capsys.readouterr().out


def test_rows_that_a_step_did_not_patch_are_found(monkeypatch):
    update = EngramTables._update
    monkeypatch.setattr(
        EngramTables, "_update", lambda self, *arguments: update(self, *arguments[:-1], [])
    )
    with pytest.raises(SystemExit, match="wrong: host, no prefetch, fp32"):
        check_placements(make_work())


def test_stale_hot_rows_are_found(monkeypatch):
    monkeypatch.setattr(HotRows, "write_through", lambda self, changed_U: None)
    with pytest.raises(SystemExit, match=r"wrong: pinned, 1 % hot, fp32"):
        check_placements(make_work())


def test_the_loop_is_the_trainers_order_of_calls(monkeypatch):
    """Of two steps: the next micro-batch is sent for before this one computes; an update follows
    each norm.
    """
    calls = []
    for name in ("fetch", "accumulate", "squared_grad_norm", "step"):
        method = getattr(EngramTables, name)

        def called(self, *arguments, name=name, method=method):
            calls.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(EngramTables, name, called)
    monkeypatch.setattr(Work, "multiply", lambda self, count: calls.append(count))
    work = make_work(products=24 * 3)
    loop = Loop(work, work.tables(placements(0)["host"]))
    loop.step()
    model = [2, 8, 62]  # products ahead of layers 2 and 10 of 24, of which forward has 24
    micro_batch = ["fetch", *model, "accumulate"]
    assert calls == ["fetch", *micro_batch, *micro_batch, "squared_grad_norm", "step"]
    calls.clear()
    loop.step()
    assert calls == [*micro_batch, *micro_batch, "squared_grad_norm", "step"]


def test_the_work_is_the_presets():
    work = make_work(run=RUN, tokens=4096, micro_batches=1)
    assert round(work.num_rows * work.engram.head_dim / 1e9, 1) == 1.6
    assert work.lookups == 4096 * 2 * 2 * 8
    ids = work.row_ids(3)
    for layer, spec in work.hashes.items():
        assert ids[layer].shape == (1, 4096, 16)
        assert 0 <= ids[layer].min() <= ids[layer].max() < spec.num_rows


def test_the_text_repeats_by_zipfs_law():
    work = make_work(run=RUN, tokens=4096)
    vocab = RUN.model.vocab_size
    phrases = work.stream.reshape(-1, 4).numpy()
    counts = np.sort(np.unique(phrases, axis=0, return_counts=True)[1])[::-1]
    for rank in (1, 10, 1000):  # the sum of 1 / r, as an integral
        assert counts[:rank].sum() / counts.sum() == pytest.approx(
            math.log(rank + 1) / math.log(vocab), rel=0.02
        )
    pairs, triples = (
        np.lib.stride_tricks.sliding_window_view(work.stream[:50].numpy(), n, 1) for n in (2, 3)
    )
    for grams, distinct in ((pairs, 0.70), (triples, 0.81)):
        shares = [len(np.unique(row, axis=0)) / len(row) for row in grams]
        assert np.mean(shares) == pytest.approx(distinct, abs=0.02)


def test_figures_of_a_row():
    """Steps of 11 ms beside 10 without a table, of which 2 waiting, 3 working; rows on the device
    cost 1.05x.
    """
    times = np.array([[10.0, 2, 3], [11, 2, 3], [11, 2, 3], [12, 2, 3]])
    result = Result(
        times=times,
        idle=np.array([[9.0, 0, 0], [10, 0, 0], [11, 0, 0]]),
        copied=(4.04, 5),
        shares=(1, 0),
    )
    assert result.ratio == pytest.approx(1.1)
    expected = ["11.00 (10.60-11.40)", "+10.00", "+4.76", "2.00", "3.00", "4.0", "5.0"]
    assert result.cells(1.05) == expected
    assert result.cells(float("nan"))[2] == "+nan"


def test_copies_are_counted_by_their_direction():
    events = [
        {
            "cat": "gpu_memcpy",
            "name": "Memcpy HtoD (Pinned -> Device)",
            "args": {"bytes": 3_000_000},
        },
        {
            "cat": "gpu_memcpy",
            "name": "Memcpy HtoD (Pageable -> Device)",
            "args": {"bytes": 1_000_000},
        },
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "args": {"bytes": 500_000}},
        {
            "cat": "gpu_memcpy",
            "name": "Memcpy DtoD (Device -> Device)",
            "args": {"bytes": 7_000_000},
        },
        {"cat": "kernel", "name": "gemm HtoD", "args": {"bytes": 9}},
        {"name": "process_name"},
    ]
    assert copied_in(events, 2) == (2.0, 0.25)
    assert all(math.isnan(size) for size in copied_in(events[4:], 2))


def test_speeds_are_printed_where_there_is_a_card(monkeypatch, capsys):
    monkeypatch.setattr(bench_engram, "gpu", lambda: "a card")
    bench(make_work(), compute_ms=0.01, steps=5)
    head, rows = capsys.readouterr().out.split("\n\n")
    assert head.startswith("a card; ")
    assert "1,536 lookups a step of 2 x 24 tokens, phrases by Zipf's law, exponent 1." in head
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows.splitlines()[2:]]
    assert "not measured" not in rows
    assert len(cells) == 1 + 2 * len(NAMES)
    for row in cells[1:]:
        assert all(math.isfinite(float(cell)) for cell in row[3:7] + row[9:])
        assert row[7:9] == ["nan", "nan"]  # the profiler sees no copies on a CPU
    assert cells[1][4] == "+0.00"


def test_a_placement_that_does_not_fit_says_so(monkeypatch):
    make = Work.tables

    def tables(work, config):
        if config.placement == "device":
            raise RunError("needs 20 GiB\nof a card")
        return make(work, config)

    monkeypatch.setattr(Work, "tables", tables)
    rows = table(make_work(), steps=1, dry=False)
    assert rows[2] == [RESIDENT, "fp32", "needs 20 GiB of a card", *[""] * 8]
    assert [row[4] for row in rows[3:7]] == ["+nan"] * 4
    assert math.isfinite(float(rows[3][3]))


def test_an_unknown_card_needs_the_time_of_its_compute():
    with pytest.raises(SystemExit, match="--compute-ms: the peak of cpu is not known"):
        bench_engram.micro_batch_ms(make_work())


def test_time_of_the_presets_micro_batch(monkeypatch):
    monkeypatch.setattr(bench_engram, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench_engram, "flops_per_token", lambda model, length: 3.956e9)
    assert bench_engram.micro_batch_ms(make_work(tokens=1000)) == pytest.approx(10.0)
