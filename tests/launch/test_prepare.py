"""The verb `prepare`, plain and under mpirun."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.prepare import main
from parallel.errors import RunError
from tests.helpers.ranks import HANG_S
from tests.launch.commands import environment

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "docs.jsonl"
    texts = [f"document {index}: " + "some words " * (index % 7) for index in range(23)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def start(num_ranks, source, out):
    """`python -m launch prepare` on ``num_ranks`` processes."""
    launcher = [MPIRUN, "--oversubscribe", "--allow-run-as-root", "-n", str(num_ranks)]
    verb = [
        sys.executable,
        "-m",
        "launch",
        "prepare",
        "--source",
        source,
        "--out",
        out,
        "--vocab-size",
        "280",
    ]
    command = [*map(str, launcher), *map(str, verb), "--val-fraction", "0.2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        env=environment(),
        **pipes,
    )


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_files_are_the_same_bytes_for_every_number_of_ranks(source, tmp_path, capsys):
    runs = {ranks: start(ranks, source, tmp_path / f"mpi{ranks}") for ranks in (2, 3)}
    words = [
        "--source",
        source,
        "--out",
        tmp_path / "plain",
        "--vocab-size",
        280,
        "--val-fraction",
        0.2,
    ]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "wrote" in printed
    assert "train" in printed
    expected = contents(tmp_path / "plain")
    assert len(expected) == 7
    for ranks, process in runs.items():
        out, err = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, err
        assert out.count("wrote") == 1
        assert contents(tmp_path / f"mpi{ranks}") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mpi2", "mpi3", "plain"]


def test_error_ends_all_ranks_with_exit_code_2(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    process = start(2, source, tmp_path / "mine")
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 2, (out, err)
    assert (out + err).count("exists already") == 1
    assert contents(tmp_path / "mine") == {"notes": b"keep"}


def test_error_of_one_process_reaches_the_caller(source, tmp_path):
    with pytest.raises(RunError, match=r"val_fraction=0\.0 must be above 0 and below 1"):
        main(["--source", str(source), "--out", str(tmp_path / "out"), "--val-fraction", "0"])
    assert not list(tmp_path.iterdir())


def test_processes_that_mpi_does_not_know_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RunError, match=r"launcher=torchrun started 2 processes, of which MPI sees 1"
    ):
        main(["--source", str(source), "--out", str(tmp_path / "out")])


def test_help_names_the_fields(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "--val-fraction" in printed
    assert "byte-level BPE" in printed
