"""Saves beside training: what is stored is the state of the step; failures end every rank at one
step and are named.
"""

import errno
import json
import re
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from parallel import failure
from parallel.agree import ONE_PROCESS
from parallel.errors import RunError
from tests.helpers.ranks import HANG_S, run_ranks
from tests.helpers.runs import (
    NO_TIME_OUT,
    forked,
    records,
    run_forked,
    wait_for_step,
    wait_until,
    words,
)
from tests.helpers.saved import assert_same_tensors, config_of, go_on
from tests.helpers.tiny import train_steps
from training.checkpoint import Saver, latest, load, save, saver
from training.checkpoint.format import checksums, planners, storage
from training.config import RunConfig
from training.run.metrics_file import read_metrics

TWO = ("--parallel.ep", "2", "--train.eval_every", "0")


def hold_saves() -> threading.Event:
    """Saves of this process end once the event is set."""
    released = threading.Event()
    real = checksums.file_records

    def file_records(path, names):
        released.wait(HANG_S)
        return real(path, names)

    checksums.file_records = file_records
    return released


def save_and_train_on(config: RunConfig, directory: Path, background: bool):
    """Save without and with the saver, train on at once;
    the figures of the steps after the save.
    """
    trainer, _ = train_steps(config, 2)
    save(directory / "whole", trainer, 2, {"n": 1})
    trainer.config = replace(config, train=replace(config.train, async_save=background))
    released = hold_saves()
    if not background:
        released.set()
    with Saver(directory / "saver", trainer, {"n": 1}) as saver:
        saver.save(2)
        first = saver.poll()
        trained = go_on(trainer, 2, 2)
        complete = latest(directory / "saver") is not None
        released.set()
    return complete, first, saver.poll(), trained


@pytest.mark.parametrize("background", [True, False])
def test_training_on_does_not_change_what_is_stored(background, tmp_path):
    config = config_of({"ep": 2})
    expected = train_steps_alone(config)
    for complete, first, then, trained in run_ranks(
        save_and_train_on, 2, config, tmp_path, background
    ):
        assert complete == (not background)
        assert trained == expected
        assert first.keys() == ({"save_stall_s"} if background else {"save_stall_s", "save_s"})
        assert then.keys() == ({"save_s"} if background else set())
        assert min({**first, **then}.values()) > 0
    assert_same_tensors(latest(tmp_path / "whole"), latest(tmp_path / "saver"))
    assert storage.read_manifest(latest(tmp_path / "saver"))["extra"] == {"n": 1}


def train_steps_alone(config: RunConfig) -> list[tuple[float, float]]:
    """Figures of steps 2 and 3 without any save."""
    return run_ranks(all_figures, 2, config)[0][2:]


def all_figures(config: RunConfig) -> list[tuple[float, float]]:
    return train_steps(config, 4)[1]


def one_after_another(config: RunConfig, directory: Path):
    """The newest complete checkpoint after the call of each save, and what is left in the end."""
    trainer, _ = train_steps(config, 1)
    config = replace(config, train=replace(config.train, keep=2, keep_every=3))
    trainer.config = config
    seen = []
    with Saver(directory, trainer, {}) as saver:
        for step in range(1, 6):
            saver.save(step)
            seen.append(latest(directory))
    return ["" if path is None else path.name for path in seen], sorted(
        path.name for path in directory.iterdir()
    )


def test_a_save_waits_for_the_one_before(tmp_path):
    for seen, left in run_ranks(one_after_another, 2, config_of({}), tmp_path):
        assert all(name >= f"step-0000000{step}" for step, name in enumerate(seen) if step)
        assert left == ["step-00000003", "step-00000004", "step-00000005"]


NUM_POLLS = 20


def fail_behind(config: RunConfig, directory: Path):
    """The second save cannot be written on rank 1, whose thread ends when it has been polled
    NUM_POLLS times.
    """
    trainer, _ = train_steps(config, 1)
    real = planners.ChunkSavePlanner.resolve_data
    polls = 0
    polled = threading.Event()
    with Saver(directory, trainer, {}) as saver:
        saver.save(1)
        saver.finish()
        if dist.get_rank() == 1:

            def full(self, write_item):
                raise OSError(errno.ENOSPC, "No space left on device")

            planners.ChunkSavePlanner.resolve_data = full
            work = saver._write
            saver._write = lambda *args: after(polled, work, *args)
        saver.save(2)
        planners.ChunkSavePlanner.resolve_data = real if dist.get_rank() == 0 else full
        try:
            while True:
                polls += 1
                if polls == NUM_POLLS:
                    polled.set()
                saver.poll()
                time.sleep(0.01)
        except RunError as error:
            text = str(error)
        assert saver.poll() == {}  # told once
    return polls, text


def after(event: threading.Event, work, *args):
    try:
        return work(*args)
    finally:
        event.wait(HANG_S)


def test_a_failed_write_is_raised_on_all_ranks_at_the_same_step(tmp_path):
    results = run_ranks(fail_behind, 2, config_of({}), tmp_path)
    assert results[0] == results[1]
    polls, text = results[0]
    assert polls >= NUM_POLLS
    assert re.search(r"step-00000002.tmp cannot be written: rank 1: OSError: .*No space left", text)
    assert "check the disk's space" in text
    assert latest(tmp_path).name == "step-00000001"


def stop_by_error(config: RunConfig, directory: Path, error: Exception):
    trainer, _ = train_steps(config, 1)
    released = hold_saves()
    try:
        with Saver(directory, trainer, {}) as saver:
            saver.save(1)
            if isinstance(error, RunError):
                threading.Timer(0.5, released.set).start()
            raise error
    except type(error):
        return released.is_set(), latest(directory) is not None
    finally:
        released.set()


@pytest.mark.parametrize(
    ("error", "waits"), [(RunError("not finite"), True), (ConnectionError("peer"), False)]
)
def test_an_error_for_the_user_lets_the_save_end(error, waits, tmp_path):
    assert run_ranks(stop_by_error, 2, config_of({}), tmp_path, error) == [(waits, waits)] * 2


def with_files(config: RunConfig, directory: Path, files: dict[str, Path]):
    trainer, _ = train_steps(config, 1)
    with Saver(directory, trainer, {}, files) as saver:
        saver.save(1)
    load(latest(directory), trainer)


def test_files_are_stored_and_verified(tmp_path, monkeypatch):
    lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(20_000)]
    (tmp_path / "run.json").write_text('{"config": {}}')
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    files = {name: tmp_path / name for name in ("run.json", "metrics.jsonl", "token_map.json")}
    run_ranks(
        with_files,
        2,
        config_of({}),
        tmp_path / "saved",
        files,
    )
    path = latest(tmp_path / "saved")
    assert (path / "run.json").read_bytes() == (tmp_path / "run.json").read_bytes()
    tail = (path / "metrics.jsonl").read_text()
    assert len(tail) > saver.TAIL_BYTES - 100
    assert "".join(lines).endswith(tail)
    assert tail.startswith('{"step": ')
    assert not (path / "token_map.json").exists()
    for name in ("run.json", "metrics.jsonl"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
        with pytest.raises(RunError, match=f"{name} differs from its checksum"):
            storage.verify(path, storage.read_manifest(path), ONE_PROCESS)
        (path / name).write_bytes(content)
    storage.verify(path, storage.read_manifest(path), ONE_PROCESS)


def test_a_directory_that_cannot_be_written_to_is_told_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/checkpoints cannot be written: .*Not a directory"):
        storage.require_writable(tmp_path / "file" / "checkpoints")
    monkeypatch.setattr(storage.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(RunError, match=r"cannot be written: .*Permission denied"):
        storage.require_writable(tmp_path / "checkpoints")


def never_ending(rank: int) -> None:
    """Saves that are still being written when the test ends."""
    hold_saves()


@pytest.mark.parametrize("steps", [100_000, 2])
def test_a_rank_killed_during_a_save_ends_the_run_and_is_named(steps, corpus, tmp_path):
    """While training goes on beside the save, and while it waits for the save at its end."""
    line = words(
        corpus, "killed", *TWO, *NO_TIME_OUT, "--train.steps", str(steps), "--train.save_every", "2"
    )
    line += ["--train.eval_rows", "1", "--train.log_every", "1000"]
    with forked(tmp_path, line, 2, patch=never_ending) as ranks:
        directory = tmp_path / "runs" / "killed"
        wait_for_step(directory, 2)
        wait_until(lambda: list(directory.glob("checkpoints/*.tmp/.metadata")), "the save")
        ranks.kill(1, signal.SIGKILL)
        assert ranks.wait(0) == 1
        assert (
            "rank 0 of 2 stops: rank 1 does not answer: killed, out of memory, or hanging"
            in ranks.text(0)
        )


def second_save_hangs_on_rank_1(rank: int) -> None:
    """Rank 1 never ends the save of step 4; rank 0 has written its share and waits for it."""
    real = checksums.file_records

    def file_records(path, names):
        if rank == 1 and path.name == "step-00000004.tmp":
            time.sleep(HANG_S)
        return real(path, names)

    checksums.file_records = file_records
    failure.GRACE_S = 1.0


@pytest.mark.parametrize(
    "waits",
    [
        ("--parallel.timeout_s", "5"),
        (*NO_TIME_OUT, "--train.checkpoint_timeout_s", "5", "--train.async_save", "False"),
    ],
    ids=["beside training", "while training waits"],
)
def test_a_rank_stopped_during_a_save_ends_the_run_in_time_and_is_named(waits, corpus, tmp_path):
    """SIGSTOP: its connections stay open. Beside training the collective of a step gives up, else
    that of the save.
    """
    line = words(
        corpus, "stopped", *TWO, *waits, "--train.steps", "100000", "--train.save_every", "2"
    )
    with forked(
        tmp_path,
        line,
        2,
        patch=second_save_hangs_on_rank_1,
    ) as ranks:
        directory = tmp_path / "runs" / "stopped" / "checkpoints"
        wait_until((directory / "step-00000004.tmp" / ".metadata").exists, "the save")
        ranks.kill(1, signal.SIGSTOP)
        assert ranks.wait(0) == 1
        assert (
            "rank 0 of 2 stops: rank 1 does not answer: killed, out of memory, or hanging"
            in ranks.text(0)
        )
    assert latest(directory) == directory / "step-00000002"
    storage.verify(latest(directory), storage.read_manifest(latest(directory)), ONE_PROCESS)


def small_files_from_step_5(rank: int) -> None:
    """From step 5 on, when the save of step 4 has ended, rank 1 may write no file above 64 KB: a
    quota, say.
    """
    from training import loop

    finish = loop.BegunStep.finish

    def limited(begun, rate, index, votes):
        if rank == 1 and index == 5:
            while not Path("runs/full/checkpoints/step-00000004").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
        return finish(begun, rate, index, votes)

    loop.BegunStep.finish = limited


def test_a_disk_that_is_full_ends_the_run_and_the_save_before_is_resumed(corpus, tmp_path):
    line = words(corpus, "full", *TWO, "--train.steps", "8")
    with forked(tmp_path, line, 2, patch=small_files_from_step_5) as ranks:
        assert ranks.codes() == [2, 2]
        told = " ".join(ranks.text(0).replace("│", " ").split())
        assert (
            "step-00000008.tmp cannot be written: rank 1: OSError: [Errno 27] File too large"
            in told
        )
        assert "cannot run" not in ranks.text(1)
    assert "resumed from runs/full/checkpoints/step-00000004" in run_forked(
        tmp_path, [*line, "--resume"], 2
    )
    assert [path.name for path in sorted((tmp_path / "runs/full/checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000008",
    ]


def test_a_run_tells_of_its_saves_and_its_checkpoint_has_what_it_needs(corpus, tmp_path):
    line = words(
        corpus,
        "told",
        "--train.steps",
        "6",
        "--train.save_every",
        "3",
    )
    run_forked(tmp_path, line)
    directory = tmp_path / "runs" / "told"
    told = read_metrics(directory / "metrics.jsonl")
    assert [record["step"] for record in told if "save_stall_s" in record] == [3, 6]
    assert sum("save_s" in record for record in told) == 2
    assert told[-1].keys() == {"step", "save_s", "time"}
    path = latest(directory / "checkpoints")
    manifest = storage.read_manifest(path)
    for name, source in SimpleNamespace(run=directory, data=corpus).__dict__.items():
        for file in {"run": ["run.json"], "data": ["tokenizer.json", "token_map.json"]}[name]:
            assert (path / file).read_bytes() == (source / file).read_bytes()
            assert file in manifest["files"]
    assert [record["step"] for record in read_metrics(path / "metrics.jsonl")][-1] == 6
    (directory / "metrics.jsonl").unlink()
    run_forked(tmp_path, [*line, "--resume", "--train.steps", "7"])
    assert [record["step"] for record in records(directory)] == [1, 2, 3, 4, 4, 5, 6, 6, 7, 7]
