"""Prepared files against the documents they were made of, read back with megatron-core's own
reader.
"""

import json
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from parallel.agree import on_every_rank, on_rank_0
from parallel.errors import RunError
from training.data import corpus
from training.data import prepare as prepare_module
from training.data.config import PrepareConfig
from training.data.encoding import store_tokens, token_dtype
from training.data.files import MANIFEST, TokenFiles, import_indexed_dataset
from training.data.prepare import choose_validation, prepare
from training.data.progress import track
from training.data.tokenizer import EOD_NAMES, load_tokenizer, special_ids, train_tokenizer

WORDS = [
    "def",
    "return",
    "self",
    "lambda",
    "",
    "\n\t",
    "x1",
    "naïve",
    "语言",
    "🙂",
    "<|endoftext|>",
    "(x,",
    "y)",
    "==",
]


def make_documents(count=40) -> list[str]:
    random = np.random.RandomState(3)
    return [f"# {index}\n" + " ".join(random.choice(WORDS, 30)) + "\n" for index in range(count)]


def write_jsonl(path: Path, documents) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    )
    return path


def write_texts(directory: Path, documents, suffix) -> Path:
    directory.mkdir(parents=True)
    for index, text in enumerate(documents):
        (directory / f"{index:03}{suffix}").write_text(text, encoding="utf-8", newline="")
    (directory / "notes.md").write_text("not a document")
    return directory


@pytest.fixture
def config(tmp_path):
    source = write_jsonl(tmp_path / "in" / "docs.jsonl", make_documents())
    return PrepareConfig(
        source=str(source), out=str(tmp_path / "out" / "set"), vocab_size=300, val_fraction=0.2
    )


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def read_split(directory, split) -> list[list[int]]:
    index = import_indexed_dataset().IndexedDataset(str(Path(directory) / split))
    assert index.document_indices.tolist() == list(range(len(index) + 1))
    return [index[i].tolist() for i in range(len(index))]


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


def test_hub_dataset_is_asked_of_datasets(config, monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_dict({"text": make_documents()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(
        replace(
            config,
            source="someone/something",
            subset="en",
            split="test",
        )
    )
    assert calls == [(("someone/something", "en"), {"split": "test"})]


def test_standard_library_is_this_interpreters(monkeypatch, tmp_path):
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = corpus.standard_library()
    assert (root / "json" / "decoder.py").read_text() in texts
    assert len(texts) > 500
    for name in ("b.py", "a/z.py", "site-packages/x.py", "a/site-packages/y.py", "a/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert corpus.standard_library() == ["a/z.py", "b.py"]


def test_validation_is_chosen_by_index_and_seed():
    chosen = choose_validation(20_000, 0.02, 0)
    assert 320 <= chosen.sum() <= 480  # 400, standard deviation 20
    assert (choose_validation(15_000, 0.02, 0)[:14_000] == chosen[:14_000]).mean() > 0.999
    assert (choose_validation(20_000, 0.02, 1) != chosen).sum() > 500
    for count in range(2, 6):
        assert 1 <= choose_validation(count, 1e-9, 0).sum() < count
        assert 1 <= choose_validation(count, 1 - 1e-9, 0).sum() < count


def test_tokenizer_is_a_function_of_the_text():
    documents = make_documents()
    trained = [train_tokenizer([documents[:20], documents[20:]], 320) for _ in range(3)]
    assert len({tokenizer.to_str() for tokenizer in trained}) == 1
    assert special_ids(trained[0]) == (0, 1)
    assert trained[0].get_vocab_size() == 320


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


def word_tokenizer(path: Path, words) -> Path:
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="unk")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    return path


def test_given_tokenizer_is_copied_and_used_whole(config, tmp_path):
    words = ["unk", "</s>", "<pad>", *(f"w{index}" for index in range(70_000))]
    path = word_tokenizer(tmp_path / "tokenizer.json", words)
    source = write_jsonl(tmp_path / "words.jsonl", ["w0 w69999 w5 w1"] * 9)
    manifest = prepare(replace(config, source=str(source), tokenizer=str(path)))
    assert (manifest["dtype"], manifest["vocab_size"]) == ("int32", 70_003)
    assert (Path(config.out) / "tokenizer.json").read_bytes() == path.read_bytes()
    assert read_split(config.out, "val")[0] == [3, 70_002, 8, 4, 1]
    assert TokenFiles.open(config.out).train.tokens.dtype == np.int32


def test_type_follows_the_vocabulary():
    assert [token_dtype(size).name for size in (1, 65_536, 65_537, 2**31)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]
    with pytest.raises(
        RunError, match=r"vocab_size=2147483649 is above the 2147483648 ids that int32 holds"
    ):
        token_dtype(2**31 + 1)


@pytest.mark.parametrize(
    ("ids", "vocab", "dtype"),
    [([5, 300], 300, "uint16"), ([65_536], 70_000, "uint16"), ([-1], 9, "int32")],
)
def test_tokens_never_wrap(ids, vocab, dtype):
    with pytest.raises(RunError, match=f"token id={ids[-1]} is outside"):
        store_tokens(ids, vocab, np.dtype(dtype))
    assert store_tokens([0, 299], 300, np.dtype("uint16")).tolist() == [0, 299]


def test_existing_output_is_replaced_only_when_asked(config):
    prepare(config)
    before = contents(config.out)
    with pytest.raises(RunError, match=r"out=.*set exists already; add --overwrite"):
        prepare(config)
    assert contents(config.out) == before
    prepare(replace(config, seed=5, overwrite=True))
    after = contents(config.out)
    assert after["train.bin"] != before["train.bin"]
    assert [path.name for path in Path(config.out).parent.iterdir()] == ["set"]


@pytest.mark.parametrize("previous", [True, False])
def test_files_of_others_are_never_replaced(config, previous):
    if previous:
        prepare(config)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    (Path(config.out) / "train.idx.bak").write_text("mine")
    before = contents(config.out)
    with pytest.raises(RunError, match=r"holds train.idx.bak, not written by prepare"):
        prepare(replace(config, overwrite=True))
    assert contents(config.out) == before
    assert len(list(Path(config.out).parent.iterdir())) == 1


def test_file_in_the_place_of_the_output_stays(config):
    Path(config.out).parent.mkdir()
    Path(config.out).write_text("mine")
    with pytest.raises(RunError, match="not written by prepare"):
        prepare(replace(config, overwrite=True))
    assert Path(config.out).read_text() == "mine"


def test_file_that_appears_during_the_run_survives(config, monkeypatch):
    prepare(config)
    merge = prepare_module._merge_parts

    def merge_while_somebody_writes(*arguments):
        (Path(config.out) / "late.txt").write_text("mine")
        return merge(*arguments)

    monkeypatch.setattr(prepare_module, "_merge_parts", merge_while_somebody_writes)
    prepare(replace(config, overwrite=True))
    assert [path.read_text() for path in Path(config.out).parent.rglob("late.txt")] == ["mine"]
    TokenFiles.open(config.out)


def test_empty_directory_is_filled(config):
    Path(config.out).mkdir(parents=True)
    prepare(config)
    TokenFiles.open(config.out)


def test_failure_leaves_the_previous_dataset_and_nothing_else(config, monkeypatch):
    prepare(config)
    before = contents(config.out)

    def fail(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(prepare_module, "_merge_parts", fail)
    with pytest.raises(MemoryError):
        prepare(replace(config, seed=5, overwrite=True))
    assert contents(config.out) == before
    assert [path.name for path in Path(config.out).parent.iterdir()] == ["set"]


def test_dataset_that_cannot_take_its_place_gives_the_old_one_back(config, monkeypatch):
    prepare(config)
    before = contents(config.out)
    rename = Path.rename

    def refuse_new(self, target):
        if self.name.startswith(".set.") and not self.name.endswith(".previous"):
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(RunError, match=r"out=.*cannot be written: disk gone"):
        prepare(replace(config, seed=5, overwrite=True))
    assert contents(config.out) == before
    assert [path.name for path in Path(config.out).parent.iterdir()] == ["set"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_passes_items_on(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(track(iter("abcdefgh"), 8, "working", show=False)) == list("abcdefgh")
    assert capsys.readouterr().err == ""
    assert list(track(iter("abcdefgh"), 8, "working")) == list("abcdefgh")
    printed = capsys.readouterr().err
    assert "100%" in printed
    if not terminal:
        assert printed.splitlines() == [f"working: {percent}%" for percent in (25, 50, 75, 100)]


class WithPeer:
    """Rank 0 of two; the other rank sends ``sent``."""

    rank = 0
    size = 2

    def __init__(self, sent):
        self.sent = sent

    def allgather(self, value):
        return [value, self.sent]

    def bcast(self, value):
        return value


def test_a_failure_of_one_rank_is_raised_on_all():
    with pytest.raises(RunError, match="theirs"):
        on_every_rank(WithPeer(RunError("theirs")), lambda: 1)
    with pytest.raises(RunError, match=r"(?s)rank 0 of 2 failed:.*ZeroDivisionError"):
        on_rank_0(WithPeer(None), lambda: 1 // 0)
    with pytest.raises(RunError, match="ours"):
        on_rank_0(WithPeer(RunError("theirs")), lambda: (_ for _ in ()).throw(RunError("ours")))
    assert on_rank_0(WithPeer(None), lambda: 7) == 7


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
        r"(?s)source=.*is empty.*out=''.*val_fraction=1\.0.*max_documents=-1.*"
        r"seed=-1.*vocab_size=200",
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


def test_hub_that_cannot_be_reached_is_named(config, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        RunError, match=r"source=no/where is no local file.*ConnectionError: no route; correct"
    ):
        prepare(replace(config, source="no/where"))
