"""Texts of every kind of file, whatever its other columns; or the line that cannot be used."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest
from pyarrow import parquet

from parallel.errors import RunError
from tests.training.data.reading import lines, read

OTHER_COLUMNS = {
    "an object and a string": ({"meta": {"a": 1}}, {"meta": "x"}),
    "null, then a string": ({"meta": None}, {"meta": "x"}),
    "an extra column": ({}, {"extra": [1, {"b": None}]}),
    "a date that is unknown once": ({"date": "2026-01-01"}, {"date": "unknown"}),
    "numbers of all sizes": ({"n": 1}, {"n": 10**400}),
    "nested and not": ({"n": [[1]]}, {"n": 1.5}),
}


@pytest.mark.parametrize("kind", OTHER_COLUMNS)
def test_other_columns_may_be_anything(tmp_path, kind):
    first, second = OTHER_COLUMNS[kind]
    for name, rows in (("a", (first, second)), ("b", (second, first))):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": name} | row) + "\n" for row in rows)
        )
    assert read(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl")[0] == ["a", "a", "b", "b"]


def test_columns_of_parquet_files_may_differ(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None], "when": [1, 2]}), tmp_path / "a.parquet")
    parquet.write_table(
        pa.table({"text": ["b"], "when": [["x"]], "more": [{"y": 1}]}), tmp_path / "b.PARQUET"
    )
    documents, reading = read(tmp_path, tmp_path)
    assert documents == ["a", "", "b"]
    assert (reading.files, reading.empty) == (2, 1)


BAD_TEXTS = {
    "a number": (lines("a", 1), r"bad.jsonl cannot be read: line 2 has a number in text"),
    "a list": (lines("a", "b", ["c"]), r"line 3 has a list in text"),
    "an object": (lines({"a": 1}, "b"), r"line 1 has an object in text"),
    "a truth value": (lines("a", True), r"line 2 has a truth value in text"),
    "no such key": (
        lines("a") + '{"body": "b"}\n',
        r"text_field=text is no column of line 2 of .*; use one of body",
    ),
    "no object": (lines("a") + "[1]\n", r"line 2 is a list, not an object"),
    "no JSON": (lines("a") + '{"text": \n', r"line 2 is not JSON: .*column"),
    "no UTF-8": (
        lines("a").encode() + b'{"text": "caf\xe9"}\n',
        r"line 2 is not UTF-8: byte 0xe9 at its byte 14",
    ),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_text_that_cannot_be_used_is_named_by_line(tmp_path, kind):
    content, message = BAD_TEXTS[kind]
    (tmp_path / "bad.jsonl").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(RunError, match=message):
        read(tmp_path, tmp_path / "bad.jsonl")


def test_numbers_in_a_parquet_column_are_named_by_row(tmp_path):
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match=r"a.parquet cannot be read: row 1 has a number in text"):
        read(tmp_path, tmp_path / "a.parquet")


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zstandard, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_read(tmp_path, suffix):
    content = lines(*(f"{index} " + "x" * index for index in range(300)))
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / f"b.JSONL{suffix.upper()}").write_bytes(COMPRESS[suffix](content.encode()))
    (tmp_path / f"c.txt{suffix}").write_bytes(COMPRESS[suffix](b"one\r\ntext"))
    documents, reading = read(tmp_path, tmp_path)
    assert documents == [*documents[:300], *documents[:300], "one\ntext"]
    assert reading.files == 3
    (tmp_path / f"b.JSONL{suffix.upper()}").write_bytes(COMPRESS[suffix](content.encode())[:-9])
    with pytest.raises(RunError, match=r"b.JSONL.* cannot be read"):
        read(tmp_path, tmp_path)
