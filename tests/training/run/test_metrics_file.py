"""Records are read whatever lies between them, and none is lost."""

import json

import pytest

from tests.training.run.records import write
from training.run.metrics_file import drop_later_records, read_lines, read_metrics, tell_bad_lines


@pytest.mark.parametrize("resumed_at", [0, 2, 5])
def test_what_was_logged_past_the_resumed_step_is_dropped(tmp_path, resumed_at):
    write(tmp_path, [1, 2, 3, 4, 5])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]
    write(tmp_path, [resumed_at + 1], resumed_at=resumed_at)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(
        range(1, resumed_at + 2)
    )
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


GOOD = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 7)]
BAD_LINES = {
    "cut short": b'{"step": 4, "lo',
    "two in one line": GOOD[0] + GOOD[1],
    "no object": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "no step": b'{"loss": 1.0}',
    "a step in words": b'{"step": "four", "loss": 1.0}',
    "a true step": b'{"step": true}',
    "a step that is none": b'{"step": null}',
    "a step beyond all": b'{"step": Infinity}',
    "a loss in words": b'{"step": 4, "loss": "low"}',
    "no UTF-8": b'{"step": 4, "loss": \xff\xfe}',
    "empty": b"",
    "zeros": b"\0" * 4096,
    "brackets without end": b"[" * 100_000,
}


@pytest.mark.parametrize("place", ["first", "middle", "last", "last without an end"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_costs_no_record(name, place, tmp_path):
    """It is left out and told; what is not past the resumed step stays; the former file is kept."""
    path = tmp_path / "metrics.jsonl"
    bad = BAD_LINES[name]
    number = {"first": 0, "middle": 3}.get(place, len(GOOD))
    lines = [*GOOD[:number], bad, *GOOD[number:]]
    former = b"\n".join(lines) + (b"" if place == "last without an end" else b"\n")
    path.write_bytes(former)
    nothing_there = not bad and place == "last without an end"
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert tell_bad_lines(read_lines(path)) == (
        "" if nothing_there else f"1 damaged line ({number + 1})"
    )

    told = drop_later_records(path, 6)
    assert path.read_bytes() == b"\n".join(GOOD) + b"\n"
    if nothing_there:
        assert told == ""
        return
    assert told == f"{path}: left out 1 damaged line ({number + 1}); the former file is {path}.1"
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == former


def test_later_records_and_bad_lines_are_told_together_and_each_former_file_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    former = b"\n".join([GOOD[0], b"{", *GOOD[1:4], b"}", b"", *GOOD[4:], b"\0", b"x", b"y", b"z"])
    path.write_bytes(former)
    told = drop_later_records(path, 4)
    assert told == (
        f"{path}: left out 2 records past step 4 and 7 damaged lines (2, 6, 7, 10, 11, ...); "
        f"the former file is {path}.1"
    )
    assert path.read_bytes() == b"\n".join(GOOD[:4]) + b"\n"
    assert drop_later_records(path, 3).endswith(
        f"left out 1 record past step 3; the former file is {path}.2"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "metrics.jsonl.1",
        "metrics.jsonl.2",
    ]
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == former


def test_a_file_that_loses_nothing_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(GOOD))  # the last line's end is missing: nothing is glued to it
    inode = path.stat().st_ino
    write(tmp_path, [7], resumed_at=6)
    assert path.stat().st_ino == inode
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert tell_bad_lines(read_lines(path)) == ""
    path.write_bytes(b"")
    assert drop_later_records(path, 0) == ""


def test_a_record_behind_a_block_of_zeros_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD[0] + b"\n" + b"\0" * 512 + GOOD[1] + b"\n" + GOOD[2] + b"\n")
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    drop_later_records(path, 2)
    assert path.read_bytes() == GOOD[0] + b"\n" + GOOD[1] + b"\n"
