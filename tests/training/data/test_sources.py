"""Every file that a source names, each once, whatever its name, form and other columns; or a word
about it.
"""

import bz2
import errno
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from parallel.errors import RunError
from tests.helpers.ranks import HANG_S
from tests.launch.commands import environment
from training.data import prepare as prepare_module
from training.data.config import PrepareConfig
from training.data.corpus import Reading, open_documents, write_documents
from training.data.prepare import choose_validation, cut_words, prepare
from training.data.progress import Progress
from training.data.work_directory import clear_leftovers
from training.owner_file import this_process

ROOT = Path(__file__).resolve().parents[2]


def lines(*texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def read(tmp_path, *sources, **fields) -> tuple[list[str], Reading]:
    """The documents of these sources, and what was told of them."""
    config = PrepareConfig(source=tuple(map(str, sources)), **fields)
    path = tmp_path / "documents.arrow"
    reading = write_documents(config, path, show=False)
    documents = open_documents(path)["text"]
    assert len(documents) == reading.documents
    return list(documents), reading


@pytest.mark.parametrize(
    "name",
    [
        "br[1]",
        "a*b",
        "q?",
        "{x,y}",
        "two words",
        "new\nline",
        "hf:",
        "a::b",
        "%20",
        "-dash",
        "ünïcode",
        "~",
    ],
)
def test_names_are_not_patterns(tmp_path, name):
    """The named directory is read, not another that its name would match as a pattern."""
    for directory in (name, "br1", "axb", "qq", "x", "y"):
        (tmp_path / "in" / directory).mkdir(parents=True)
        (tmp_path / "in" / directory / f"{name}.jsonl").write_text(
            lines(f"of {directory}", "second")
        )
    assert read(tmp_path, tmp_path / "in" / name)[0] == [f"of {name}", "second"]
    assert read(tmp_path, tmp_path / "in" / name / f"{name}.jsonl")[0] == [f"of {name}", "second"]


def test_a_pattern_that_is_no_path_is_expanded(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(name))
    assert read(tmp_path, tmp_path / "*.jsonl")[0] == ["a.jsonl", "b.jsonl"]
    assert read(tmp_path, tmp_path / "**" / "*.jsonl")[0] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    with pytest.raises(RunError, match=r"is no path, and as a pattern it matches none"):
        read(tmp_path, tmp_path / "*.json")


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


def test_what_a_directory_holds(tmp_path):
    """Links are followed, each file is read once, what nobody means is left out, and all of it is
    told.
    """
    place = tmp_path / "in"
    for name in (
        "a.jsonl",
        "b.TXT",
        "sub/c.py",
        ".d.jsonl",
        ".ipynb_checkpoints/e.py",
        "__pycache__/f.py",
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(lines("a") if name == "a.jsonl" else Path(name).name)
    for name in ("g.csv", "h.csv", "README"):
        (place / name).write_text("x")
    (place / "empty.txt").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "i.txt").write_text("i")
    (place / "linked").symlink_to(outside)
    (place / "again").symlink_to(outside)
    (place / "loop").symlink_to(place)
    (place / "a-again.jsonl").symlink_to(place / "a.jsonl")
    (place / "gone.txt").symlink_to(place / "nowhere")
    documents, reading = read(tmp_path, place)
    assert sorted(documents) == ["a", "b.TXT", "c.py", "i"]
    assert reading.files == 4
    told = dict(reading.ignored)
    assert (told["hidden"], told[".csv"], told["empty"], told["without a suffix"]) == (3, 2, 1, 1)
    assert (told["dangling link"], told["given twice"]) == (1, 1)


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


def small(tmp_path, *texts) -> PrepareConfig:
    (tmp_path / "docs.jsonl").write_text(lines(*texts))
    return PrepareConfig(
        source=str(tmp_path / "docs.jsonl"), out=str(tmp_path / "out" / "set"), vocab_size=300
    )


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


REFUSED = {
    "a file above": lambda out: out.parent.write_text("x"),
    "a dangling link": lambda out: out.parent.symlink_to(out.parent.parent / "gone" / "deeper"),
    "a loop of links": lambda out: out.parent.symlink_to(out.parent),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_output_that_cannot_be_written_is_named(tmp_path, kind):
    config = small(tmp_path, "a", "b")
    REFUSED[kind](Path(config.out))
    with pytest.raises(RunError, match=r"^out="):
        prepare(config)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    config = small(tmp_path, "a", "b")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module, "_merge_parts", fail)
    with pytest.raises(RunError, match=r"out=.*cannot be written: No space left on device"):
        prepare(config)
    assert not list(Path(config.out).parent.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_removes_the_working_directory(tmp_path, number):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        lines(*("".join(map(chr, range(97, 123))) * 400 for _ in range(4000)))
    )
    command = [
        sys.executable,
        "-m",
        "launch",
        "prepare",
        "--source",
        tmp_path / "in",
        "--out",
        tmp_path / "out" / "set",
    ]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + HANG_S
    while not list((tmp_path / "out").glob(".set.*/documents.arrow")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, told = process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + number
    assert f"ended by {number.name}: nothing was written" in told
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_run_left_goes_with_the_next(tmp_path, capsys):
    out = tmp_path / "set"
    dead, living, foreign = (tmp_path / f".set.{digit * 12}" for digit in "abc")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = this_process(job="")
    owners = {
        dead: here | {"pid": ended.pid},
        living: here,
        foreign: here | {"host": "elsewhere", "machine": "another boot"},
    }
    for path, owner in owners.items():
        path.mkdir()
        (path / "owner.json").write_text(json.dumps(owner))
    (tmp_path / ".set.mine").mkdir()
    clear_leftovers(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [living.name, foreign.name, ".set.mine"]
    )
    told = capsys.readouterr().err
    assert "removed" in told
    assert "on elsewhere" in told
    old = time.time() - 8 * 24 * 3600
    for path in (foreign, foreign / "owner.json"):
        os.utime(path, (old, old))
    clear_leftovers(out)
    assert not foreign.exists()


def test_progress_tells_speed_and_time_left(capsys):
    now = [0.0]
    with Progress("reading", 2**22, clock=lambda: now[0]) as progress:
        for second in range(1, 9):
            now[0] = float(second)
            progress.advance(2**19)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "reading: 62% of 4.0 MiB, 0.5 MiB/s, eta 0:03"
    assert told[-1] == "reading: 100% of 4.0 MiB, 0.5 MiB/s"


def test_one_source_may_be_a_string(tmp_path):
    config = small(tmp_path, "a", "b")
    assert config == replace(config, source=(str(tmp_path / "docs.jsonl"),))
