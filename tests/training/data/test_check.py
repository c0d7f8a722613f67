"""Problems of a dataset before training are those of opening it."""

import json
import shutil

import pytest

from training.data.check import data_problems
from training.data.config import DataConfig, PrepareConfig
from training.data.prepare import prepare


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
