"""A dataset directory that is opened: what it holds, and every way in which it can be damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import RunError
from tests.training.data.documents import make_documents, read_split, write_jsonl
from training.data.config import PrepareConfig
from training.data.files import MANIFEST, TokenFiles, prepare_command
from training.data.prepare import prepare
from training.data.token_map import load_token_map


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A finished dataset, to be copied before it is damaged."""
    root = tmp_path_factory.mktemp("dataset")
    source = write_jsonl(root / "docs.jsonl", make_documents())
    prepare(
        PrepareConfig(
            source=str(source),
            out=str(root / "set"),
            vocab_size=300,
            val_fraction=0.2,
        )
    )
    return root / "set"


def test_opened_files_are_what_was_written(dataset):
    files = TokenFiles.open(dataset)
    for split, opened in (("train", files.train), ("val", files.val)):
        parts = np.split(opened.tokens, opened.ends[:-1])
        assert [part.tolist() for part in parts] == read_split(dataset, split)
        assert opened.starts.tolist() == [0, *opened.ends[:-1].tolist()]
    assert files.vocab_size == files.tokenizer().get_vocab_size() == 300
    token_map = load_token_map(files.token_map_path, files.tokenizer_path)
    assert len(token_map.ids) == 300


def edit(path: Path, remove="", **changes) -> None:
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    manifest.pop(remove, None)
    (path / MANIFEST).write_text(json.dumps(manifest))


def scramble(path: Path) -> None:
    """An index of the same size without its header."""
    data = (path / "train.idx").read_bytes()
    (path / "train.idx").write_bytes(b"X" * 9 + data[9:])


def reword(path: Path) -> None:
    """Another tokenizer of the same size."""
    file = path / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"<|pad|>", b"<|dap|>"))


def empty(path: Path) -> None:
    files = json.loads((path / MANIFEST).read_text())["files"]
    (path / "val.bin").write_bytes(b"")
    edit(path, val={"documents": 0, "tokens": 0, "bytes": 0}, files=files | {"val.bin": 0})


def halve(path: Path) -> None:
    """A shorter .bin whose size dataset.json confirms."""
    data = (path / "train.bin").read_bytes()
    (path / "train.bin").write_bytes(data[: len(data) // 4 * 2])
    edit(path, files={"train.bin": len(data) // 4 * 2})


DAMAGE = {
    "gone": (shutil.rmtree, r"does not exist; run: python -m launch prepare"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "holds no dataset.json"),
    "no json": (lambda path: (path / MANIFEST).write_text("{"), "has a damaged dataset.json"),
    "other format": (lambda path: edit(path, version=99), "is not a dataset of format"),
    "no key": (lambda path: edit(path, remove="eod_id"), "has a dataset.json without eod_id"),
    "index": (scramble, r"has a damaged train.idx"),
    "no bin": (lambda path: (path / "train.bin").unlink(), "lacks train.bin"),
    "cut bin": (
        lambda path: (path / "train.bin").write_bytes(b"12"),
        r"has 2 bytes in train.bin, not the \d+",
    ),
    "other tokenizer": (reword, "tokenizer.json that the tokens were not made with"),
    "empty": (empty, "has no tokens in its val split"),
    "dtype": (
        lambda path: edit(path, dtype="int8"),
        "stores tokens as int8, not as uint16 or int32",
    ),
    "vocabulary": (
        lambda path: edit(path, vocab_size=70_000),
        "70000 tokens, which uint16 cannot hold",
    ),
    "index dtype": (lambda path: edit(path, dtype="int32"), "stores uint16 tokens in train.idx"),
    "counts": (halve, r"has \d+ tokens in train.bin, but its index counts"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(dataset, tmp_path, name):
    damage, message = DAMAGE[name]
    path = shutil.copytree(dataset, tmp_path / "set")
    TokenFiles.open(path)
    damage(path)
    with pytest.raises(RunError, match=rf"data.path=.*set .*{message}"):
        TokenFiles.open(path)


def test_only_the_default_dataset_is_said_to_be_made_of_the_standard_library():
    """Any other would be overwritten by, or made of, text that nobody asked for."""
    assert prepare_command(Path("data/stdlib"), "--overwrite") == (
        "python -m launch prepare --overwrite"
    )
    assert prepare_command(Path("data/pretrain")) == (
        "python -m launch prepare --source TEXT_FILES_OR_HUB_DATASET --out data/pretrain"
    )
