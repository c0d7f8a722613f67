"""metrics.jsonl as it is found: every record that can be read, whatever lies between them.

A kill cuts a line short, a power loss leaves blocks of zeros, an editor an empty line. None of that
may cost the records before or after it.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# What readers compute with; a record in which one of these is something else is none.
NUMBERS = ("loss", "val_loss")
MAX_LISTED = 5


@dataclass(frozen=True)
class Line:
    """One line of the file."""

    number: int
    """Number of the line in the file, from 1."""
    content: bytes
    """As it lies on the disk, without the line's end."""
    record: Record | None
    """None where the line is no record."""


def read_lines(path: Path) -> list[Line]:
    """All lines of a metrics.jsonl, in order."""
    contents = path.read_bytes().split(b"\n")
    if not contents[-1]:
        contents.pop()
    return [Line(number, content, _parse(content)) for number, content in enumerate(contents, 1)]


def read_metrics(path: Path) -> list[Record]:
    """All records of a metrics.jsonl, each with a number ``step``; lines that are none are left
    out.
    """
    return [line.record for line in read_lines(path) if line.record is not None]


def tell_bad_lines(lines: list[Line]) -> str:
    """How many lines are no records, and which; empty where all are."""
    numbers = [str(line.number) for line in lines if line.record is None]
    if not numbers:
        return ""
    listed = ", ".join(numbers[:MAX_LISTED]) + (", ..." if len(numbers) > MAX_LISTED else "")
    return f"{len(numbers)} damaged line{'s' * (len(numbers) > 1)} ({listed})"


def drop_later_records(path: Path, step: int) -> str:
    """Take the records past ``step`` out of a metrics.jsonl, and what is no record.

    The file is replaced whole, and the former one kept beside it under a numbered name. Where there
    is nothing to take out the file is not touched, but for the end of its last line.

    Returns:
        What was done, in a line for the reader; empty where nothing was.
    """
    lines = read_lines(path)
    kept = [line for line in lines if line.record is not None and line.record["step"] <= step]
    if len(kept) == len(lines):
        _end_last_line(path)
        return ""
    fresh = path.with_suffix(".tmp")
    with open(fresh, "wb") as file:
        file.write(b"".join(line.content.strip(b"\0") + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    former = _keep_aside(path)
    os.replace(fresh, path)
    bad = tell_bad_lines(lines)
    num_later = len(lines) - len(kept) - sum(line.record is None for line in lines)
    later = f"{num_later} record{'s' * (num_later > 1)} past step {step}" if num_later else ""
    return (
        f"{path}: left out {' and '.join(filter(None, (later, bad)))}; the former file is {former}"
    )


def _parse(content: bytes) -> Record | None:
    try:
        record = json.loads(content.strip(b"\0"))
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(record, dict)
        or not _is_number(record.get("step"))
        or not math.isfinite(record["step"])
    ):
        return None
    return record if all(_is_number(record[name]) for name in NUMBERS if name in record) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keep_aside(path: Path) -> Path:
    """Give the file a second name that nothing has yet; the first stays."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.{number}")
        if aside.exists():
            continue
        with contextlib.suppress(OSError):  # there are file systems without hard links
            os.link(path, aside)
            return aside
        shutil.copyfile(path, aside)
        return aside
    raise AssertionError("unreachable")


def _end_last_line(path: Path) -> None:
    """A record that is appended must not be glued to one whose line's end was lost."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
