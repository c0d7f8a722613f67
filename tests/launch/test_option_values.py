"""Numbers and words as people write them reach their fields, or are told."""

import pytest

from launch.train_request import parse
from parallel.errors import RunError


@pytest.mark.parametrize(
    ("typed", "steps"),
    [("1e3", 1000), ("1_000", 1000), ("2.5e2", 250), ("12", 12), ("1E2", 100), ("7.0", 7)],
)
def test_whole_numbers_as_people_write_them(typed, steps):
    assert parse(["tiny", "--train.steps", typed]).run.train.steps == steps
    assert parse(["tiny", f"--train.steps={typed}"]).run.train.steps == steps


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--train.steps", "1.5e0"], "is not a whole number"),
        (["--train.steps", "1k"], "is not a whole number"),
        (["--train.steps", "inf"], "is not a whole number"),
        (["--train.steps", "1e999999999"], "is not a whole number"),
        (["--train.steps", "three"], "is not a whole number"),
        (["--train.steps"], "has no value"),
        (["--train.steps", "1", "2"], "has 2 values"),
        (["--optimizer.learning_rate", "fast"], "is not a number"),
        (["--optimizer.betas", "0.9"], "has 1 value; give it a number, 2 times"),
        (["--optimizer.betas", "0.9", "x"], "is not a number"),
        (["--model.engram.layers", "1", "a"], "is not a whole number"),
        (["--train.compile", "yes"], "is not True or False"),
        (["--train.dtype", "fp16"], "is not one of bf16, fp32"),
    ],
)
def test_values_of_another_type(words, rule):
    with pytest.raises(RunError) as error:
        parse(["tiny", *words])
    assert [rule in str(problem) for problem in error.value.problems] == [True]


def test_good_words_reach_their_fields():
    run = parse(
        [
            "tiny",
            "--optimizer.betas",
            "0.8",
            "9e-1",
            "--train.compile",
            "true",
            "--model.engram.layers=2",
            "--name=x-1",
        ]
    ).run
    assert run.optimizer.betas == (0.8, 0.9)
    assert run.train.compile
    assert run.model.engram.layers == (2,)
    assert run.name == "x-1"
    assert parse(["tiny", "--resume", "--train.steps", "3"]).resume
