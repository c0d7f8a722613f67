"""From what is typed to a checked request."""

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from launch import train_problems
from launch.env import Process
from launch.option_values import field_types
from launch.train import main
from launch.train_problems import find_problems
from launch.train_request import Request, parse
from parallel.errors import RunError
from tests.launch.commands import launch
from training.config import RunConfig
from training.presets import PRESETS
from training.run_file import save_run_json


def said(request, tmp_path, process=Process()):  # noqa: B008
    return [str(problem) for problem in find_problems(request, process, tmp_path)]


def test_a_preset_with_fields():
    request = parse(
        [
            "tiny",
            "--train.steps",
            "3",
            "--parallel.sequence_parallel",
            "True",
            "--model.engram.layers",
            "0",
            "2",
            "--optimizer.learning-rate=1e-4",
            "--resume",
        ]
    )
    assert request.resume
    assert not request.overwrite
    preset = PRESETS["tiny"]()
    assert request.run == replace(
        preset,
        model=replace(preset.model, engram=replace(preset.model.engram, layers=(0, 2))),
        train=replace(preset.train, steps=3),
        parallel=replace(preset.parallel, sequence_parallel=True),
        optimizer=replace(preset.optimizer, learning_rate=1e-4),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_function_returns(name):
    assert parse([name]).run == PRESETS[name]()


def test_engram_in_and_out():
    assert parse(["tiny", "--model.engram", "none", "--train.steps", "3"]).run.model.engram is None
    assert parse(["moe-3b", "--model.engram.layers", "3"]).run.model.engram.layers == (3,)
    with pytest.raises(RunError, match="can only be none"):
        parse(["tiny", "--model.engram", "yes"])


def test_every_field_has_a_name_on_the_command_line():
    names = list(field_types(RunConfig))
    assert {
        "name",
        "model.mamba2.chunk_size",
        "model.engram.table_size",
        "parallel.tp",
        "table.eps",
    } <= set(names)
    assert "model" not in names


def test_nearest_names():
    with pytest.raises(RunError, match=r"preset=tinny .* did you mean tiny\?"):
        parse(["tinny"])
    with pytest.raises(RunError) as error:
        parse(["tiny", "--train.stepz", "3", "--model.patern=M", "--lr", "1"])
    assert [problem.fix for problem in error.value.problems] == [
        "did you mean --train.steps?",
        "did you mean --model.pattern?",
        "use --optimizer.learning_rate",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_words_that_are_no_options_are_told_by_rank_0(rank, capsys):
    with pytest.raises(SystemExit) as error:
        parse(["tiny", "three", "--train.steps", "3"], rank)
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert ("three" in printed.err + printed.out) == (rank == 0)


def test_a_saved_configuration_starts_a_run(tmp_path):
    config = PRESETS["hybrid-27b"]()
    save_run_json(tmp_path / "run.json", config, world_size=1)
    again = parse(["--config", str(tmp_path / "run.json"), "--name", "again"]).run
    assert again == replace(config, name="again")
    assert parse([f"--config={tmp_path / 'run.json'}"]).run == config


def test_layout_directory_and_memory_are_told_together(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/run.json").write_text("{}")
    run = parse(["tiny", "--parallel.ep", "3", "--model.engram.table_size", "1000000000000"]).run
    problems = said(Request(run=run), tmp_path)
    assert len(problems) == 3
    assert problems[0].startswith("parallel.ep=3 does not divide the 1 processes")
    assert "add --resume to continue it, --overwrite to start anew" in problems[1]
    assert "model.engram.table_size=1000000000000 needs" in problems[2]
    assert "use at most" in problems[2]


def test_the_largest_table_that_is_told_fits_and_is_what_the_tables_take(tmp_path, monkeypatch):
    """Refused with a gibibyte free; the size that is told is accepted, a hundredth more is not."""
    monkeypatch.setattr(train_problems, "free_host_bytes", lambda: 2**30)
    run = PRESETS["hybrid-27b"]()
    run = replace(run, table=replace(run.table, hot_rows=1000))

    def sized(table_size: int) -> list[str]:
        engram = replace(run.model.engram, table_size=table_size)
        return said(Request(run=replace(run, model=replace(run.model, engram=engram))), tmp_path)

    (problem,) = sized(10**6)
    assert "1.0 GiB are free; use at most" in problem
    largest = int(problem.partition("use at most ")[2].partition(",")[0])
    assert sized(largest) == []
    assert len(sized(largest + largest // 100)) == 1


@pytest.mark.parametrize("free", [None, 2**60])
def test_memory_that_the_system_does_not_tell_refuses_no_table(free, tmp_path, monkeypatch):
    monkeypatch.setattr(train_problems, "free_host_bytes", lambda: free)
    assert said(Request(run=PRESETS["hybrid-27b"]()), tmp_path) == []


def test_tables_are_shared_by_nodes(tmp_path):
    config = PRESETS["hybrid-27b"]()  # 65 GiB of rows and moments
    run = replace(
        config, model=replace(config.model, engram=replace(config.model.engram, table_size=10**10))
    )
    crowded = Process(world_size=8, local_world_size=8)
    spread = Process(world_size=2**20, local_world_size=1)
    assert len(said(Request(run=run), tmp_path, crowded)) == 1
    spread_run = replace(run, train=replace(run.train, global_batch=2**20))
    assert said(Request(run=spread_run), tmp_path, spread) == []
    on_device = replace(run, table=replace(run.table, placement="device"))
    assert said(Request(run=on_device), tmp_path, crowded) == []


def test_the_runs_directory(tmp_path):
    run = PRESETS["tiny"]()
    resume = Request(run=run, resume=True)
    overwrite = Request(run=run, overwrite=True)
    assert said(Request(run=run), tmp_path) == []
    assert said(overwrite, tmp_path) == []
    (tmp_path / "tiny2").mkdir()
    assert said(resume, tmp_path) == [
        f"name=tiny has no {tmp_path}/tiny to resume; did you mean --name tiny2?"
    ]
    (tmp_path / "tiny").mkdir()
    assert said(Request(run=run), tmp_path) == []  # empty: nothing of another run
    (tmp_path / "tiny/metrics.jsonl").write_text("")
    assert said(resume, tmp_path) == []
    assert said(overwrite, tmp_path) == []
    assert "names the existing" in said(Request(run=run), tmp_path)[0]
    assert (
        "contradicts --overwrite"
        in said(Request(run=run, resume=True, overwrite=True), tmp_path)[0]
    )


PATTERN = ("--model.pattern", "-M*E")


@pytest.mark.parametrize(
    "line",
    [
        [*PATTERN, "--train.steps", "3"],
        ["--train.steps", "3", *PATTERN],
        ["--train.steps=3", "--model.pattern=-M*E"],
        ["--model.pattern", "-", "--train.steps", "3"],
        ["--train.steps", "3", "--model.pattern", "--M"],
        ["--train.steps", "3", "--model.pattern", "---", "--name", "-x", "--overwrite"],
    ],
)
def test_a_pattern_may_begin_with_a_dense_layer(line):
    request = parse(["tiny", *line])
    joined = " ".join(line).replace("pattern=", "pattern ").split()
    assert request.run.model.pattern == joined[joined.index("--model.pattern") + 1]
    assert request.run.train.steps == 3
    assert request.run.name == ("-x" if "-x" in line else PRESETS["tiny"]().name)


def test_an_option_is_not_taken_for_a_value():
    with pytest.raises(RunError, match="--lr is no field of a run"):
        parse(["tiny", "--name", "--lr", "3"])


NAMES = {
    "": "plain",
    ".": "plain",
    "..": "plain",
    "a/b": "plain",
    "/tmp/x": "plain",
    "x" * 300: "300 bytes",
    "é" * 130: "260 bytes",
    "a\0b": "printed",
    "two\nlines": "printed",
    "\udc80": "printed",
    "a\x1b[31m": "printed",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_directory_can_have(name, tmp_path):
    (problem,) = said(Request(run=replace(PRESETS["tiny"](), name=name)), tmp_path / "runs")
    assert problem.startswith("name=")
    assert NAMES[name] in problem
    assert len(problem) < 200
    assert problem.isprintable()


@pytest.mark.parametrize("name", ["two words", "it's", "-x", "été", "a.b", " ", "$HOME", "x" * 240])
def test_names_that_serve(name, tmp_path):
    assert said(Request(run=replace(PRESETS["tiny"](), name=name)), tmp_path / "runs") == []


PLACES = {
    "runs is a link to nothing": (
        lambda runs: runs.symlink_to("gone"),
        "runs is a link to gone, which is not there",
    ),
    "runs is a file": (lambda runs: runs.write_text(""), "runs is a file, not a directory"),
    "the run is a link to nothing": (
        lambda runs: (runs.mkdir(), (runs / "tiny").symlink_to("gone")),
        "runs/tiny is a link to gone",
    ),
    "the run is a file": (
        lambda runs: (runs.mkdir(), (runs / "tiny").write_text("")),
        "runs/tiny is a file",
    ),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_where_no_run_can_be(name, how, tmp_path):
    spoil, told = PLACES[name]
    spoil(tmp_path / "runs")
    (problem,) = said(Request(run=PRESETS["tiny"](), **how), tmp_path / "runs")
    assert told in problem


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_where_this_user_may_not_write(mode):
    """Root may: so another user asks."""
    with tempfile.TemporaryDirectory() as directory:
        runs = Path(directory) / "runs"
        runs.mkdir()
        runs.chmod(mode)
        Path(directory).chmod(0o755)
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("fork"), os.setuid, (65534,)
        ) as other_user:
            (problem,) = other_user.submit(said, Request(run=PRESETS["tiny"]()), runs).result()
    assert problem.startswith(f"runs={runs}")
    assert "cannot be" in problem


def test_too_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.train_problems.allow_open_files", lambda: 64)
    (problem,) = said(Request(run=PRESETS["tiny"]()), tmp_path)
    assert (
        problem == "ulimit -n=64 is below the 192 open files that a process needs; ulimit -n 4096"
    )


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x"])
def test_a_run_stays_in_its_directory(name, tmp_path):
    run = replace(PRESETS["tiny"](), name=name)
    assert "is not a plain directory name" in said(Request(run=run), tmp_path)[0]


def test_usage_lists_presets(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in PRESETS)


def test_faults_of_five_parts_stand_in_one_box(corpus):
    done = launch(
        "train",
        "tiny",
        "--lr",
        "1",
        "--train.steps",
        "three",
        "--parallel.ep",
        "3",
        "--name",
        "a/b",
        "--data.path",
        str(corpus),
        "--data.seq_length",
        "1e6",
        "--model.vocab_size",
        "8",
    )
    assert done.returncode == 2
    assert done.stderr.count("•") == 6
    fields = (
        "option=--lr",
        "train.steps=three",
        "parallel.ep=3",
        "name='a/b'",
        "model.vocab_size=8",
    )
    assert all(field in done.stderr for field in (*fields, "data.seq_length=1000000"))
    assert "Traceback" not in done.stderr


def test_a_preset_that_is_none_does_not_hide_options():
    with pytest.raises(RunError) as error:
        parse(["tinny", "--lr", "1", "--model.engram", "none", "--train.steps", "x"])
    assert [problem.field for problem in error.value.problems] == [
        "preset",
        "option",
        "train.steps",
    ]
