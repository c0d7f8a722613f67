"""What comes after the last save is said in a line each where it fails, and never changes a run's
exit code.
"""

import os
import shlex
import shutil
import sys

import pytest

from tests.helpers.runs import forked, records, run_forked, words
from training.data.files import TokenFiles
from training.decode.generate import generate
from training.run import ending as report
from training.run import sample
from training.run_file import load_run_json

SHORT = ("--train.steps", "1", "--train.eval_rows", "1")
EP2 = ("--parallel.ep", "2")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Directory of a finished run, and what it printed."""
    cwd = tmp_path_factory.mktemp("finished")
    return cwd / "runs" / "whole", run_forked(cwd, words(corpus, "whole", *SHORT))


def test_the_sample_is_what_the_checkpoint_says(finished):
    run, printed = finished
    text = printed.partition("sample:\n")[2].partition("\nto train further")[0]
    settings = sample.SAMPLE_TOKENS, sample.TEMPERATURE, sample.TOP_P, 0
    assert text == generate(run, sample.PROMPT, *settings)


def _without_matplotlib(run, patch):
    patch.setitem(sys.modules, "matplotlib", None)


def _full_disk(run, patch):
    (run / "loss.png").symlink_to("/dev/full")


def _no_memory(run, patch):
    def refuse(*args):
        raise MemoryError

    patch.setattr(report, "validation_entropies", refuse)


def _empty_validation(run, patch):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "val_loss" not in line))


def _metrics_gone(run, patch):
    (run / "metrics.jsonl").unlink()


def _all_gone(run, patch):
    shutil.rmtree(run)


# what happens -> (how, parts that are left out)
SPOILED = {
    "matplotlib is missing": (_without_matplotlib, ["loss curve: left out (ModuleNotFoundError"]),
    "the disk is full": (_full_disk, ["loss curve: left out (OSError"]),
    "no memory is left": (_no_memory, ["validation loss: left out (MemoryError)"]),
    "nothing was evaluated": (_empty_validation, ["validation loss: left out (IndexError"]),
    "the metrics are gone": (
        _metrics_gone,
        ["validation loss: left out (File", "loss curve: left out (File"],
    ),
    "the run is gone": (
        _all_gone,
        ["validation loss: left out (File", "loss curve: left out (File"],
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_part_that_fails_is_a_line(finished, tmp_path, monkeypatch, capsys, name):
    spoil, left_out = SPOILED[name]
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "loss.png").unlink()
    config = load_run_json(run / "run.json")
    files = TokenFiles.open(config.data.path)
    spoil(run, monkeypatch)
    report.show_end(config, files, run, 1, "text of the model")
    printed = capsys.readouterr().out
    assert printed.count("left out (") == len(left_out)
    assert all(line in printed for line in left_out)
    assert "sample:\ntext of the model\nto train further: " in printed


def _prompt_of_no_letters(rank: int) -> None:
    sample.PROMPT = "\ud800"


def _fail_on(broken: int):
    def patch(rank: int) -> None:
        draw = sample.continue_tokens

        def fail(*args):
            if rank == broken:
                raise MemoryError("no room on the card")
            return draw(*args)

        sample.continue_tokens = fail

    return patch


def _die(rank: int) -> None:
    if rank == 1:
        sample.continue_tokens = lambda *args: os._exit(9)


# what happens -> (patch, exit codes of two ranks)
IN_THE_SAMPLE = {
    "rank 0 fails": (_fail_on(0), [0, 0]),
    "rank 1 fails": (_fail_on(1), [0, 0]),
    "rank 1 dies": (_die, [0, 9]),
    "all fail": (_prompt_of_no_letters, [0, 0]),
}


@pytest.mark.parametrize("name", IN_THE_SAMPLE)
def test_a_sample_that_fails_leaves_the_rest_and_the_exit_code(corpus, tmp_path, name):
    patch, codes = IN_THE_SAMPLE[name]
    with forked(
        tmp_path,
        words(corpus, "run", *SHORT, *EP2),
        2,
        patch=patch,
    ) as ranks:
        assert ranks.codes() == codes, ranks.text(0)
        printed = ranks.text(0)
    assert printed.count("to train further: ") == 1
    assert (tmp_path / "runs/run/loss.png").exists()
    assert "Traceback" not in printed
    assert [record["step"] for record in records(tmp_path / "runs" / "run")] == [1, 1]


def test_where_tensor_ranks_share_tokens_the_command_is_named(corpus, tmp_path, monkeypatch):
    printed = run_forked(tmp_path, words(corpus, "run", *SHORT, "--parallel.tp", "2"), 2)
    (line,) = [line for line in printed.splitlines() if line.startswith("sample: ")]
    command = shlex.split(line.partition(": ")[2])
    assert command[:4] == ["python", "-m", "launch", "generate"]
    monkeypatch.chdir(tmp_path)
    assert generate(tmp_path / command[4], command[6], 3, 0.0, 1.0, 0).startswith(sample.PROMPT)
