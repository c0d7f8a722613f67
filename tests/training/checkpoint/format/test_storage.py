"""Directories of checkpoints: committed whole or absent, whatever kills a save; what is kept,
passed over and left alone.
"""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from parallel.errors import RunError
from tests.helpers.ranks import run_ranks
from tests.training.checkpoint.format.small import halves, value_of, write
from training.checkpoint import latest, prune
from training.checkpoint import save_and_load as run
from training.checkpoint.format import planners, storage
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import Chunk, LogicalTensor


def die(*args) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(directory: Path, step: int, where: str) -> None:
    """Save in a process of its own that is killed at a moment of the save."""

    def main() -> None:
        torch.set_num_threads(1)
        if where == "writing":
            planners.ChunkSavePlanner.resolve_data = die
        else:
            # The renames of a save: DCP's metadata, a checkpoint of the same step aside, the new
            # one, the old one away.
            real = os.rename
            renames = int(where)
            calls = iter(range(renames))
            os.rename = lambda old, new: real(old, new) if next(calls, None) is not None else die()
        write(directory, step, 2.0)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("where", ["writing", "0", "1"])
def test_a_kill_leaves_the_previous_checkpoint_and_the_next_save_cleans_up(where, tmp_path):
    write(tmp_path, 1, 1.0)
    killed(tmp_path, 2, where)
    assert (tmp_path / "step-00000002.tmp").exists()
    assert latest(tmp_path) == tmp_path / "step-00000001"
    assert value_of(latest(tmp_path)) == 1.0
    write(tmp_path, 3, 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize(("renames", "value"), [("0", 1.0), ("1", 1.0), ("2", 1.0), ("3", 2.0)])
def test_a_kill_while_a_step_is_saved_again_leaves_one_of_both(renames, value, tmp_path):
    write(tmp_path, 2, 1.0)
    killed(tmp_path, 2, renames)
    assert value_of(latest(tmp_path)) == value
    write(tmp_path, 2, 3.0)
    assert value_of(latest(tmp_path)) == 3.0
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_prune_keeps_the_newest_and_what_others_wrote(tmp_path):
    for step in (1, 2, 10, 20):
        write(tmp_path, step, step)
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    (tmp_path / "step-best").mkdir()
    prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001",
        "step-00000002",
        "step-00000020",
        "step-best",
    ]
    assert [path.name for path in (tmp_path / "step-00000001").iterdir()] == ["notes.txt"]
    assert len(list((tmp_path / "step-00000002").iterdir())) == 4
    assert value_of(latest(tmp_path)) == 20.0
    with pytest.raises(RunError, match=r"train\.keep=0 is below 1"):
        prune(tmp_path, 0)


def test_prune_keeps_every_so_many_steps_for_good(tmp_path):
    for step in (1, 2, 3, 4, 6, 7, 8, 9):
        write(tmp_path, step, step)
    prune(tmp_path, 1, 3)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [3, 6, 9]
    prune(tmp_path, 2)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [6, 9]


def test_a_manifest_of_another_run_is_found(tmp_path):
    mine = write(tmp_path / "mine", 1, 1.0)
    other = write(tmp_path / "other", 1, 2.0)
    (mine / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(RunError, match=r"__0_0\.distcp differs from its checksum"):
        value_of(mine)
    assert value_of(other) == 2.0


def test_only_files_that_are_removed_again_can_be_attached(tmp_path):
    for name in storage.ATTACHED:
        assert storage.WRITTEN.fullmatch(name)
    with pytest.raises(AssertionError, match=r"notes\.txt"):
        run.write(
            tmp_path,
            halves(torch.ones(4, 3)),
            {"format": 1, "step": 1},
            run._comm(),
            {"notes.txt": b""},
        )


def test_latest_counts_by_number(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    for step in (99_999_999, 100_000_000, 5):
        write(tmp_path, step, 0)
    assert latest(tmp_path).name == "step-100000000"


def test_later_checkpoints_that_are_passed_over_are_told(tmp_path):
    paths = {step: write(tmp_path, step, 0) for step in (3, 6, 9, 12)}
    (paths[3] / "manifest.json").unlink()  # older than the newest good one
    (paths[9] / "__0_0.distcp").unlink()
    (paths[12] / "manifest.json").write_text("{")
    assert latest(tmp_path) == paths[6]
    cut, unreadable = storage.passed_over(tmp_path, paths[6])
    assert cut == f"passed over {paths[9]}: it is incomplete: __0_0.distcp is missing"
    assert unreadable.startswith(
        f"passed over {paths[12]}: it is damaged: manifest.json cannot be read"
    )
    assert len(storage.passed_over(tmp_path, None)) == 3


def test_a_partial_directory_with_files_of_others_is_left_alone(tmp_path):
    left = tmp_path / "step-00000007.tmp"
    left.mkdir()
    (left / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds files that no save writes: notes.txt"):
        write(tmp_path, 7, 1.0)
    write(tmp_path, 8, 1.0)
    assert (left / "notes.txt").read_text() == "mine"


def save_with_a_full_disk(directory: Path) -> tuple[str, float]:
    """On rank 1 the disk is full at the first try."""
    comm = run._comm()
    rows = torch.full((2, 3), 5.0)
    mine = [Chunk(Box((2 * comm.rank, 0), (2, 3)), rows)]
    tensors = {"x": LogicalTensor((4, 3), torch.float32, mine)}
    record = {"format": 1, "step": 4}
    real = planners.ChunkSavePlanner.resolve_data

    def full(self, write_item):
        raise OSError(errno.ENOSPC, "No space left on device")

    if comm.rank == 1:
        planners.ChunkSavePlanner.resolve_data = full
    text = ""
    try:
        run.write(directory, tensors, record, comm)
    except RunError as error:
        text = str(error)
    assert latest(directory) is None
    assert comm.rank != 0 or not list(directory.iterdir())
    planners.ChunkSavePlanner.resolve_data = real
    run.write(directory, tensors, record, comm)
    return text, float(rows.sum())


def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_nothing(tmp_path):
    results = run_ranks(save_with_a_full_disk, 2, tmp_path)
    assert all("rank 1: OSError: [Errno 28] No space left on device" in text for text, _ in results)
    assert value_of(latest(tmp_path)) == 5.0


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write(tmp_path / "file", 1, 1.0)
