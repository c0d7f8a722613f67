"""Options as they are typed: other trainers' names, numbers as people write them, and all that is
wrong at once.
"""

import json
import shutil

import pytest

from launch.option_names import ADVICE, FIELDS, what_is_meant
from launch.option_values import field_types, read_words
from launch.train import parse
from parallel.errors import RunError
from tests.launch.commands import launch
from training.config import RunConfig
from training.data.check import data_problems
from training.data.config import DataConfig, PrepareConfig
from training.data.prepare import prepare

TYPES = field_types(RunConfig)
# Option: what its answer must name.
MEANT = {
    "--lr": "--optimizer.learning_rate",
    "--learning-rate": "--optimizer.learning_rate",
    "--train.lr": "--optimizer.learning_rate",
    "--optimizer.lr=3e-4": "--optimizer.learning_rate",
    "--warmup_steps": "--optimizer.warmup_steps",
    "--train.warmup_steps": "--optimizer.warmup_steps",
    "--wd": "--optimizer.weight_decay",
    "--weight-decay": "--optimizer.weight_decay",
    "--batch-size": "--train.global_batch",
    "--bs": "--train.global_batch",
    "--global-batch-size": "--train.global_batch",
    "--micro-batch-size": "--train.micro_batch",
    "--training.local_batch_size": "--train.micro_batch",
    "--per_device_train_batch_size": "--train.micro_batch",
    "--seq-len": "--data.seq_length",
    "--training.seq_len": "--data.seq_length",
    "--model.max_seq_len": "--data.seq_length",
    "--max-steps": "--train.steps",
    "--train-iters": "--train.steps",
    "--steps": "--train.steps",
    "--epochs": "--train.steps",
    "--num_train_epochs": "--train.steps",
    "--bf16": "--train.dtype bf16",
    "--fp32": "--train.dtype fp32",
    "--fp16": "there is no fp16",
    "--tp": "--parallel.tp",
    "--train.tp": "--parallel.tp",
    "--tensor-model-parallel-size": "--parallel.tp",
    "--ep": "--parallel.ep",
    "--expert-model-parallel-size": "--parallel.ep",
    "--zero-stage": "--parallel.zero_stage",
    "--zero_optimization.stage": "--parallel.zero_stage",
    "--save-interval": "--train.save_every",
    "--eval-interval": "--train.eval_every",
    "--logging_steps": "--train.log_every",
    "--seed": "--train.seed",
    "--output-dir": "runs/<name>",
    "--dataset": "--data.path",
    "--data-path": "--data.path",
    "--num-layers": "--model.pattern",
    "--hidden-size": "--model.d_model",
    "--num-attention-heads": "--model.attention.num_heads",
    "--LR": "--optimizer.learning_rate",
    "--head_dim": "use one of --model.mamba2.head_dim, --model.attention.head_dim, "
    "--model.engram.head_dim",
}


@pytest.mark.parametrize("option", MEANT)
def test_names_of_other_trainers_are_answered_with_ours(option):
    kept, (problem,) = read_words([option, "3", "--train.steps", "4"], TYPES)
    assert MEANT[option] in problem.fix
    assert kept == ["--train.steps", "4"]


def test_answers_name_fields():
    assert set(FIELDS.values()) <= set(TYPES)
    named = " ".join(ADVICE.values()).replace(",", "").replace(":", "").replace(";", "").split()
    for word in (
        word
        for word in named
        if word.startswith(("--optimizer.", "--train.", "--parallel.", "--data."))
    ):
        assert word.removeprefix("--") in TYPES
    assert "lists them" in what_is_meant("zzz", list(TYPES))


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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A few documents with a vocabulary of 300."""
    root = tmp_path_factory.mktemp("data")
    texts = [" ".join(f"word{(i * j) % 97}" for j in range(200)) for i in range(12)]
    source = root / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(PrepareConfig(source=str(source), out=str(root / "out"), vocab_size=300))
    return root / "out"


def said(problems) -> list[str]:
    return [str(problem) for problem in problems]


def test_problems_of_data_are_those_of_opening_them(dataset):
    from training.data.files import TokenFiles

    files = TokenFiles.open(dataset)
    good = DataConfig(path=str(dataset), seq_length=16)
    assert data_problems(good, files.vocab_size) == []
    longest = len(files.train.tokens) - 1
    assert data_problems(DataConfig(path=str(dataset), seq_length=longest), files.vocab_size) == []
    (told,) = data_problems(DataConfig(path=str(dataset), seq_length=longest + 1), files.vocab_size)
    assert (told.field, told.fix) == (
        "data.seq_length",
        f"use at most {longest}, or prepare more documents",
    )
    both = data_problems(DataConfig(path=str(dataset), seq_length=0, seed=-1), files.vocab_size - 1)
    assert [problem.field for problem in both] == [
        "data.seq_length",
        "data.seed",
        "model.vocab_size",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: (path / "dataset.json").unlink(), "holds no dataset.json"),
        (lambda path: (path / "dataset.json").write_text("{"), "has a damaged dataset.json"),
        (lambda path: (path / "train.bin").unlink(), "lacks train.bin"),
        (lambda path: (path / "val.bin").write_bytes(b"x"), "has 1 bytes in val.bin"),
        (lambda path: edit(path, train={}), "has a damaged dataset.json"),
        (lambda path: edit(path, files=[]), "has a damaged dataset.json"),
        (lambda path: edit(path, val={"tokens": 0, "bytes": 0}), "has no tokens in its val split"),
        (
            lambda path: edit(path, train={"tokens": 1, "bytes": 1}),
            "has 1 token in its train split",
        ),
    ],
)
def test_damaged_datasets(change, expected, dataset, tmp_path):
    path = shutil.copytree(dataset, tmp_path / "copy")
    change(path)
    (told,) = said(data_problems(DataConfig(path=str(path), seq_length=16), 300))
    assert expected in told


def edit(path, **fields) -> None:
    file = path / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_faults_of_five_parts_stand_in_one_box(dataset):
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
        str(dataset),
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
