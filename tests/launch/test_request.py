"""Requests as they are typed: of every verb all that is wrong is told in one box."""

import json
from dataclasses import asdict, dataclass

import pytest

from launch.request import read_request
from parallel.ranges import Count, range_problems
from tests.launch.commands import launch
from training.config import RunConfig
from training.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a verb of these tests is asked for."""

    steps: Count = 1
    ranks: tuple[int, ...] = (1, 2)
    overwrite: bool = False


def read(*words):
    """The words that are left to parse, and what is told of the others."""
    kept, problems = read_request(Request, list(words), lambda words: words, "--")
    return kept, [str(problem) for problem in problems]


def test_what_is_wrong_is_told_and_left_out():
    kept, told = read("--stepz", "3", "--ranks", "1", "x", "--steps", "1e3", "--no-overwrite")
    assert kept == ["--steps", "1000", "--no-overwrite"]
    assert told == [
        "option=--stepz is no option; did you mean --steps?",
        "--ranks=x is not a whole number; correct it, or leave it out",
    ]


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["tiny", "--steps", "3"], ["tiny", "--steps", "3"]),
        (["--steps", "3", "tiny"], ["tiny", "--steps", "3"]),
        (["--overwrite", "tiny", "-h"], ["--overwrite", "tiny", "-h"]),
        (["--ranks", "1", "2", "--help"], ["--ranks", "1", "2", "--help"]),
        (["--steps", "-1"], ["--steps=-1"]),
    ],
)
def test_words_of_the_verbs_own_are_kept(words, kept):
    assert read(*words) == (kept, [])


def told_by(*words) -> tuple[list[str], str]:
    """The fields in the box that a command ends with, and all that it says."""
    done = launch(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("cannot run") == 1
    lines = [line for line in done.stderr.splitlines() if "•" in line]
    return [line.split("•")[1].strip().partition("=")[0] for line in lines], done.stderr


COMMANDS = {
    "train": {
        "option": "--lr 3",
        "train.steps": "--train.steps three",
        "parallel.tp": "--parallel.tp 3",
        "model.d_model": "--model.d_model 0",
        "model.engram.orders": "--model.engram.orders 3",
        "table.sinkhorn_threshold": "--table.sinkhorn_threshold nan",
        "data.seq_length": "--data.seq_length -1",
        "optimizer.min_ratio": "--optimizer.min_ratio 2",
        "parallel.timeout_s": "--parallel.timeout_s 0",
    },
    "prepare": {
        "max_documents": "--max_documents x",
        "option": "--ovrwrite",
        "out": "--out=",
        "vocab_size": "--vocab-size 5",
        "val_fraction": "--val_fraction nan",
        "seed": "--seed -1",
    },
    "plan": {
        "--host_gib": "--host_gib x",
        "preset": "",
        "--ranks": "--ranks 8 0",
        "--step_s": "--step_s inf",
    },
}


@pytest.mark.parametrize(("verb", "source"), [("train", "tiny"), ("prepare", ""), ("plan", "t")])
def test_a_command_tells_all_at_once(corpus, verb, source):
    words = " ".join([verb, source, *COMMANDS[verb].values()]).split()
    if verb == "train":
        words += ["--data.path", str(corpus)]
    assert told_by(*words)[0] == list(COMMANDS[verb])


def test_a_saved_configuration_is_told_whole_with_what_is_typed_over_it(tmp_path):
    config = asdict(PRESETS["tiny"]())
    config["train"] |= {"steps": "x", "keep": 0, "stepz": 3}
    config["model"]["engram"] |= {"layers": [1, "a"], "head_dim": 0}
    config["optimizer"] = 3
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": config}))
    fields, _ = told_by("train", "--config", str(path), "--train.keep_every", "y")
    assert fields == [
        "train.stepz",
        "model.engram.layers.1",
        "optimizer",
        "train.steps",
        "model.engram.head_dim",
        "train.keep",
        "train.keep_every",
    ]
    assert told_by("plan", str(path), "--ranks", "0")[0] == [*fields[:-1], "--ranks"]


def test_a_saved_number_outside_of_its_range_may_be_typed_over(tmp_path):
    config = asdict(RunConfig())
    config["train"]["keep"] = 0
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": config}))
    from launch.train_request import parse

    assert [problem.field for problem in range_problems(parse(["--config", str(path)]).run)] == [
        "train.keep"
    ]
    typed = parse(["--config", str(path), "--train.keep", "2"])
    assert range_problems(typed.run) == []
