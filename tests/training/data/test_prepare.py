"""Prepared files against the documents they were made of, read back with megatron-core's own
reader.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from parallel.errors import RunError
from tests.training.data.documents import (
    contents,
    make_documents,
    read_split,
    word_tokenizer,
    write_jsonl,
)
from tests.training.data.reading import small
from training.data import prepare as prepare_module
from training.data.files import MANIFEST, TokenFiles
from training.data.prepare import choose_validation, cut_words, prepare
from training.data.tokenizer import EOD_NAMES, load_tokenizer, train_tokenizer


def write_texts(directory: Path, documents, suffix) -> Path:
    directory.mkdir(parents=True)
    for index, text in enumerate(documents):
        (directory / f"{index:03}{suffix}").write_text(text, encoding="utf-8", newline="")
    (directory / "notes.md").write_text("not a document")
    return directory


def test_files_hold_every_document_in_order(config):
    manifest = prepare(config)
    documents = make_documents()
    tokenizer = load_tokenizer(Path(config.out) / "tokenizer.json")
    validates = choose_validation(len(documents), 0.2, 0)
    assert 2 <= validates.sum() <= 16
    for split, chosen in (("train", ~validates), ("val", validates)):
        expected = [text for text, kept in zip(documents, chosen, strict=True) if kept]
        stored = read_split(config.out, split)
        assert [
            tokenizer.decode(tokens[:-1], skip_special_tokens=False) for tokens in stored
        ] == expected
        assert all(tokens[-1] == 0 and 0 not in tokens[:-1] for tokens in stored)
        assert manifest[split] == {
            "documents": len(expected),
            "tokens": sum(map(len, stored)),
            "bytes": len("".join(expected).encode()),
        }
    assert (manifest["dtype"], manifest["eod_id"], manifest["pad_id"]) == ("uint16", 0, 1)
    assert json.loads((Path(config.out) / MANIFEST).read_text()) == manifest
    assert sorted(contents(config.out)) == sorted([MANIFEST, *manifest["files"]])
    assert [path.name for path in Path(config.out).parent.iterdir()] == ["set"]


def test_same_documents_from_every_kind_of_file(config, tmp_path):
    documents = make_documents()
    datasets.Dataset.from_dict({"text": documents, "id": range(40)}).to_parquet(
        str(tmp_path / "docs.parquet")
    )
    sources = {
        "parquet": tmp_path / "docs.parquet",
        "txt": write_texts(tmp_path / "txt", documents, ".txt"),
        "py": write_texts(tmp_path / "py" / "deeper", documents, ".py").parent,
        "jsonl": write_jsonl(tmp_path / "two" / "a.jsonl", documents[:25]).parent,
    }
    write_jsonl(tmp_path / "two" / "b.jsonl", documents[25:])
    prepare(config)
    expected = contents(config.out)
    for name, source in sources.items():
        out = tmp_path / "sets" / name
        prepare(replace(config, source=str(source), out=str(out)))
        got = contents(out)
        assert {key for key in got if got[key] != expected[key]} == {MANIFEST}, name


def test_other_column_and_fewer_documents(config, tmp_path):
    rows = [{"body": text, "text": 1} for text in make_documents()]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = prepare(
        replace(
            config,
            source=str(source),
            text_field="body",
            max_documents=9,
        )
    )
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 9


def test_empty_documents_are_left_out(config, tmp_path):
    documents = make_documents()
    gaps = [text if index % 3 else ("", None)[index % 2] for index, text in enumerate(documents)]
    source = write_jsonl(tmp_path / "gaps.jsonl", gaps)
    manifest = prepare(replace(config, source=str(source)))
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == sum(
        i % 3 > 0 for i in range(40)
    )
    assert min(map(len, read_split(config.out, "train"))) > 1


def test_without_end_of_document(config):
    prepare(replace(config, append_eod=False))
    stored = read_split(config.out, "train") + read_split(config.out, "val")
    assert all(0 not in tokens for tokens in stored)


def test_validation_is_chosen_by_index_and_seed():
    chosen = choose_validation(20_000, 0.02, 0)
    assert 320 <= chosen.sum() <= 480  # 400, standard deviation 20
    assert (choose_validation(15_000, 0.02, 0)[:14_000] == chosen[:14_000]).mean() > 0.999
    assert (choose_validation(20_000, 0.02, 1) != chosen).sum() > 500
    for count in range(2, 6):
        assert 1 <= choose_validation(count, 1e-9, 0).sum() < count
        assert 1 <= choose_validation(count, 1 - 1e-9, 0).sum() < count


def test_tokenizer_learns_from_training_documents_up_to_a_size(config, monkeypatch):
    seen = []
    monkeypatch.setattr(prepare_module, "SAMPLE_BYTES", 1)
    monkeypatch.setattr(prepare_module, "BATCH", 4)
    monkeypatch.setattr(
        prepare_module,
        "train_tokenizer",
        lambda texts, size: train_tokenizer(seen.extend(texts) or seen, size),
    )
    prepare(config)
    documents = make_documents()
    validates = choose_validation(len(documents), 0.2, 0)
    assert len(seen) == 1
    assert len(seen[0]) == 4
    assert not any(validates[documents.index(text)] for text in seen[0])


def test_given_tokenizer_is_copied_and_used_whole(config, tmp_path):
    words = ["unk", "</s>", "<pad>", *(f"w{index}" for index in range(70_000))]
    path = word_tokenizer(tmp_path / "tokenizer.json", words)
    source = write_jsonl(tmp_path / "words.jsonl", ["w0 w69999 w5 w1"] * 9)
    manifest = prepare(replace(config, source=str(source), tokenizer=str(path)))
    assert (manifest["dtype"], manifest["vocab_size"]) == ("int32", 70_003)
    assert (Path(config.out) / "tokenizer.json").read_bytes() == path.read_bytes()
    assert read_split(config.out, "val")[0] == [3, 70_002, 8, 4, 1]
    assert TokenFiles.open(config.out).train.tokens.dtype == np.int32


def write_bad_sources(root: Path) -> None:
    (root / "none").mkdir()
    (root / "none" / "c.csv").write_text("c")
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    (root / "not.json").write_text("{}")
    write_jsonl(root / "one.jsonl", ["a"])
    write_jsonl(root / "blank.jsonl", ["", ""])
    word_tokenizer(root / "blank.json", ["unk", "a"])


BAD = {
    "none": ({"source": "none"}, r"source=.*has no file with text in \.jsonl"),
    "broken": ({"source": "broken.jsonl"}, r"source=.*broken.jsonl cannot be read"),
    "latin": (
        {"source": "latin.txt"},
        r"source=.*latin.txt cannot be read: line 1 is not UTF-8: byte 0xe9 at its byte 4",
    ),
    "single": ({"source": "one.jsonl"}, r"source=.*has 1 documents; give two"),
    "blank": (
        {"source": "blank.jsonl"},
        r"source=.*leaves no text in a split: 0 of 2 documents hold text",
    ),
    "numbers": (
        {"source": "numbers.jsonl"},
        r"source=.*numbers.jsonl cannot be read: line 1 has a number in text, not text",
    ),
    "column": (
        {"text_field": "body"},
        r"text_field=body is no column of line 1 of .*docs.jsonl; use one of id, text",
    ),
    "tokenizer": ({"tokenizer": "gone.json"}, r"tokenizer=.*gone.json does not exist"),
    "garbage": ({"tokenizer": "not.json"}, r"tokenizer=.*not.json is not a tokenizer"),
    "no_eod": ({"tokenizer": "blank.json"}, rf"has no token that ends a document.*{EOD_NAMES[-1]}"),
    "values": (
        {
            "source": "",
            "val_fraction": 1.0,
            "vocab_size": 200,
            "seed": -1,
            "max_documents": -1,
            "out": "",
        },
        r"(?s)source=.*is empty.*out=''.*vocab_size=200.*val_fraction=1\.0.*max_documents=-1.*"
        r"seed=-1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(config, tmp_path, name):
    write_bad_sources(tmp_path)
    changes, message = BAD[name]
    changes = {
        key: str(tmp_path / v) if key in ("source", "tokenizer") and v else v
        for key, v in changes.items()
    }
    with pytest.raises(RunError, match=message):
        prepare(replace(config, **changes))
    assert not list(Path(config.out).parent.glob("*"))


def test_a_document_with_text_validates_wherever_there_is_one(tmp_path):
    for seed in range(20):
        has_text = np.random.RandomState(seed).rand(30) < 0.1
        has_text[[3, 4]] = True
        chosen = choose_validation(30, 0.01, seed, has_text)
        assert 1 <= chosen[has_text].sum() < has_text.sum()
    manifest = prepare(small(tmp_path, "a", *[""] * 20, "b"))
    assert manifest["train"]["documents"] == manifest["val"]["documents"] == 1
    assert (manifest["read"]["documents"], manifest["read"]["empty"]) == (22, 20)


def test_a_word_without_end_trains_a_tokenizer(tmp_path, capsys):
    letters = np.random.RandomState(0).choice(list("abcdefghij"), 500_000)
    word = "".join(letters)
    manifest = prepare(
        replace(
            small(tmp_path, *[f"some words {index}" for index in range(9)], word), val_fraction=0.01
        )
    )
    assert (
        "1 words of more than 4,096 characters, cut to train the tokenizer"
        in capsys.readouterr().err
    )
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == 9 * len("some words 0") + len(
        word
    )
    assert cut_words("a b" * 9, Counter()) == "a b" * 9
