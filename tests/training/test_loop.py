"""A run that was stopped goes on as if it had not been: the same bits, every step once, and nothing
else is touched.
"""

import itertools
import os
import re
import shlex
import signal
from dataclasses import replace

import numpy as np
import pytest

from parallel.errors import RunError
from tests.helpers.runs import (
    contents,
    forked,
    hold_after,
    records,
    run_forked,
    wait_for_step,
    wait_until,
    words,
)
from tests.launch.commands import run
from training.data.files import TokenFiles
from training.run.run_data import _require_targets
from training.run_file import load_run_json

STEPS = 8


def argv(corpus, name, *more, dtype="fp32"):
    return words(
        corpus,
        name,
        "--parallel.ep",
        "2",
        "--train.dtype",
        dtype,
        *more,
    )


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Directory with the run ``whole-<dtype>``, never interrupted, and what each printed."""
    cwd = tmp_path_factory.mktemp("whole")
    printed = {}
    for dtype in ("fp32", "bf16"):
        printed[dtype] = run_forked(cwd, argv(corpus, f"whole-{dtype}", dtype=dtype), 2)
    return cwd, printed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_killed_after_a_save_it_goes_on_bitwise_and_logs_each_step_once(
    corpus, whole, tmp_path, dtype
):
    """kill -9 between the saves after steps 4 and 8, of both ranks at once."""
    directory = tmp_path / "runs" / "cut"
    with forked(
        tmp_path,
        argv(corpus, "cut", dtype=dtype),
        2,
        patch=hold_after(6),
    ) as ranks:
        wait_for_step(directory, 6)
        wait_until(
            (directory / "checkpoints" / "step-00000004").exists,
            "the end of the save beside steps 5 and 6",
        )
        for rank in (0, 1):
            ranks.kill(rank, signal.SIGKILL)
        assert ranks.codes() == [-signal.SIGKILL] * 2
    logged = [record["step"] for record in records(directory)]
    assert max(logged) > 4  # these steps are trained again
    printed = run_forked(tmp_path, argv(corpus, "cut", "--resume", dtype=dtype), 2)
    assert "resumed from runs/cut/checkpoints/step-00000004" in printed
    expected = records(whole[0] / "runs" / f"whole-{dtype}")
    assert [record["step"] for record in expected] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert records(directory) == expected


def test_a_metrics_file_that_was_cut_short_is_repaired(corpus, whole, tmp_path):
    """The run of one process stops after its last save; half a line follows; it goes on for four
    steps more.
    """
    run_forked(tmp_path, argv(corpus, "more", "--parallel.ep", "1"))
    path = tmp_path / "runs" / "more" / "metrics.jsonl"
    with path.open("a") as stream:
        stream.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    config = load_run_json(tmp_path / "runs" / "more" / "run.json")
    assert config.train.steps == STEPS
    run_forked(
        tmp_path, ["train", "--config", "runs/more/run.json", "--resume", "--train.steps", "12"]
    )
    steps = [record["step"] for record in records(path.parent)]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    assert load_run_json(path.parent / "run.json").train.steps == 12


def test_the_printed_command_goes_on(corpus, whole):
    """As printed, from the directory where the run was started, for twice as many steps."""
    cwd, printed = whole
    command = re.findall(r"^to train further: (.+)$", printed["bf16"], re.MULTILINE)[-1]
    assert command.endswith(
        "--config runs/whole-bf16/run.json --resume --train.steps 16 --optimizer.schedule_steps 8"
    )
    before = records(cwd / "runs" / "whole-bf16")
    done = run(*shlex.split(command), cwd=cwd)
    assert done.returncode == 0, done.stderr
    after = records(cwd / "runs" / "whole-bf16")
    assert after[: len(before)] == before
    assert [record["step"] for record in after[len(before) :]] == [
        9,
        10,
        11,
        12,
        12,
        13,
        14,
        15,
        16,
        16,
    ]


def test_an_existing_run_is_left_alone(corpus, whole, tmp_path):
    (tmp_path / "runs").mkdir()
    os.symlink(whole[0] / "runs" / "whole-fp32", tmp_path / "runs" / "whole-fp32")
    before = contents(whole[0] / "runs" / "whole-fp32")
    refused = {
        (): "names the existing",
        ("--resume", "--data.seed", "1"): "no longer gives the rows",
        ("--resume", "--model.d_model", "64"): "model.d_model",
    }
    for more, message in refused.items():
        with forked(tmp_path, argv(corpus, "whole-fp32", *more), 2) as ranks:
            assert ranks.codes() == [2, 2]
            assert message in ranks.text(0)
            assert "cannot run" not in ranks.text(1)  # one box
        assert contents(whole[0] / "runs" / "whole-fp32") == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["whole-fp32"]


def test_overwrite_moves_the_earlier_run_aside(corpus, tmp_path):
    short = ("--train.steps", "1", "--train.eval_rows", "1")
    printed = run_forked(
        tmp_path,
        argv(
            corpus,
            "again",
            *short,
            "--parallel.ep",
            "1",
            "--overwrite",
        ),
    )
    assert "the earlier run" not in printed
    (tmp_path / "runs" / "again" / "notes.txt").write_text("mine")
    first = contents(tmp_path / "runs" / "again")
    for number in (1, 2):
        printed = run_forked(
            tmp_path,
            argv(
                corpus,
                "again",
                *short,
                "--parallel.ep",
                "1",
                "--overwrite",
            ),
        )
        assert f"the earlier run is now runs/again.{number}" in printed
    assert contents(tmp_path / "runs" / "again.1") == first
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "again",
        "again.1",
        "again.2",
    ]
    assert [record["step"] for record in records(tmp_path / "runs" / "again")] == [1, 1]


def test_losses_that_are_not_finite_end_the_run_before_anything_is_updated(corpus, tmp_path):
    with forked(
        tmp_path,
        argv(corpus, "nan"),
        2,
        patch=_infinite_weight,
    ) as ranks:
        assert ranks.codes() == [2, 2]
        assert (
            "step 2: loss nan, gradient norm nan: not finite, first on rank 0, gradient of"
            in ranks.text(0)
        )
        assert "cannot run" not in ranks.text(1)
    assert [record["step"] for record in records(tmp_path / "runs" / "nan")] == [1, 2]


def _infinite_weight(rank: int) -> None:
    from training import loop

    steps = itertools.count()

    class Broken(loop.BegunStep):
        def __init__(self, trainer, batches, upcoming):
            if next(steps) == 2 and rank == 1:
                trainer.model.layers[1].mixer.experts.down.data[0, 0, 0] = float("inf")
            super().__init__(trainer, batches, upcoming)

    loop.BegunStep = Broken


@pytest.mark.parametrize("name", ["train", "val"])
def test_documents_without_a_target_are_refused(corpus, name):
    """Of one token each: a run on them would reach a loss of zero."""
    files = TokenFiles.open(corpus)
    _require_targets(files)
    split = getattr(files, name)
    single = replace(split, ends=np.arange(1, len(split.tokens) + 1))
    with pytest.raises(
        RunError, match=f"only documents of a single token in its {name} split: nothing to predict"
    ):
        _require_targets(replace(files, **{name: single}))
