"""Documents of the interpreter and of the hub."""

import sysconfig
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from parallel.errors import RunError
from tests.training.data.documents import make_documents
from tests.training.data.reading import read
from training.data import corpus
from training.data.prepare import prepare


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


def test_hub_that_cannot_be_reached_is_named(config, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        RunError, match=r"source=no/where is no local file.*ConnectionError: no route; correct"
    ):
        prepare(replace(config, source="no/where"))


def test_several_sources_of_several_kinds(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"m": {"t": "a"}, "m.u": 1}\n{"m.t": "b", "m": 3}\n')
    (tmp_path / "c.txt").write_text("c")
    parquet.write_table(pa.table({"m": [{"t": "d"}, None]}), tmp_path / "d.parquet")
    sources = [tmp_path / name for name in ("c.txt", "d.parquet", "a.jsonl", "c.txt")]
    documents, reading = read(tmp_path, *sources, text_field="m.t")
    assert documents == ["c", "d", "", "a", "b"]
    assert reading.ignored == {"given twice": 1}
    assert read(tmp_path, *sources, text_field="m.t", max_documents=2)[0] == ["c", "d"]
    with pytest.raises(RunError) as raised:
        read(
            tmp_path,
            tmp_path / "c.txt",
            tmp_path / "no.jsonl",
            tmp_path / "neither",
        )
    assert len(raised.value.problems) == 2


def test_half_a_surrogate_pair_is_mended_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n{"text": "\\ud83d\\ude42"}\n')
    documents, reading = read(tmp_path, tmp_path / "a.jsonl")
    assert documents == ["x\ufffdy", "🙂"]
    assert reading.mended == 1
