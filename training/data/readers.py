"""The texts of one file, each with its place: JSON lines, parquet, or a text file, compressed or
not.

Of a record only the text is looked at: other columns may hold anything, and may differ from one
record to the next.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from parallel.errors import Problem, RunError
from training.data.sources import SourceFile, printable

BUFFER_BYTES = 2**20
ROWS = 256  # of a parquet file, held at once
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MISSING = object()
# Numbers are not looked at: as floats, none of them is too long for Python.
DECODER = json.JSONDecoder(parse_int=float)
# What the readers raise; pyarrow's errors are among them.
CANNOT_READ = (OSError, EOFError, ValueError, NotImplementedError, zlib.error, lzma.LZMAError)
KIND_NAMES = {
    bool: "a truth value",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class _CountedFile(io.FileIO):
    """A file that tells how many bytes have been read of it."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._advance(count or 0)
        return count


def read_texts(
    file: SourceFile, field: str, advance: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """The texts of ``file`` in their order; "" where a record has null.

    A text of JSON lines may hold half a surrogate pair, which is no character.

    Args:
        field: key or column of the text; dots lead into objects, unless a key has just that name.
        advance: is told the bytes that have been read.

    Raises:
        RunError: the file cannot be read, or a record has no text; says which line or row.
    """
    read = {"jsonl": _read_json_lines, "parquet": _read_parquet, "text": _read_text}[file.kind]
    try:
        with io.BufferedReader(_CountedFile(file.path, advance), BUFFER_BYTES) as stream:
            yield from read(_decompress(stream, file.compression), file.path, field)
    except CANNOT_READ as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise _unreadable(file.path, f"{type(error).__name__}: {first_line}") from error


def _decompress(stream: BinaryIO, compression: str) -> BinaryIO:
    if not compression:
        return stream
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"), BUFFER_BYTES)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return io.BufferedReader(openers[compression](stream), BUFFER_BYTES)


def _read_text(stream: BinaryIO, path: Path, _: str) -> Iterator[str]:
    """The whole file, every end of a line as ``\\n``."""
    text = _decode(stream.read(), path, first_line=1)
    yield text.replace("\r\n", "\n").replace("\r", "\n")


def _read_json_lines(stream: BinaryIO, path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.isspace() or not line:
            continue
        text = _decode(line, path, first_line=number)
        try:
            record = DECODER.decode(text)
        except json.JSONDecodeError as error:
            raise _unreadable(
                path, f"line {number} is not JSON: {error.msg}, column {error.colno}"
            ) from error
        except RecursionError as error:
            raise _unreadable(path, f"line {number} is nested too deeply") from error
        if not isinstance(record, dict):
            raise _unreadable(path, f"line {number} is {_kind(record)}, not an object")
        yield _text_of(
            record,
            field,
            path,
            f"line {number}",
            list(record),
        )


def _read_parquet(stream: BinaryIO, path: Path, field: str) -> Iterator[str]:
    from pyarrow import parquet

    file = parquet.ParquetFile(stream)
    leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    columns = file.schema_arrow.names
    if not any(leaf == field or leaf.startswith(f"{field}.") for leaf in leaves):
        raise _no_column(field, path, "", columns)
    number = 0
    for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
        for record in _rows(batch, path, number):
            number += 1
            yield _text_of(record, field, path, f"row {number}", columns)
    if number != file.metadata.num_rows:
        raise _unreadable(
            path, f"it has {file.metadata.num_rows} rows, of which {number} were read"
        )


def _rows(batch: Any, path: Path, number: int) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow batch, of which the first is row ``number`` + 1 of the file."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            raise _unreadable(path, f"row {number + 1} is not UTF-8") from error
        for index in range(batch.num_rows):
            yield from _rows(batch.slice(index, 1), path, number + index)
    else:
        yield from rows


def _decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        line = first_line + data.count(b"\n", 0, start)
        column = error.start - start + 1
        rule = f"line {line} is not UTF-8: byte 0x{data[error.start]:02x} at its byte {column}"
        raise _unreadable(path, rule) from error


def _text_of(record: dict[str, Any], field: str, path: Path, place: str, columns: list[str]) -> str:
    value = look_up(record, field)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if value is MISSING:
        raise _no_column(field, path, f"{place} of ", columns)
    rule = f"cannot be read: {place} has {_kind(value)} in {printable(field)}, not text"
    fix = "name a column of text with --text-field, or repair that record"
    raise RunError(
        Problem(
            field="source",
            value=printable(path),
            rule=rule,
            fix=fix,
        )
    )


def look_up(record: dict[str, Any], field: str) -> Any:
    """The value under a key or a dotted path; None where an object on the way is null, MISSING
    where there is none.
    """
    if field in record:
        return record[field]
    first, dot, rest = field.partition(".")
    inner = record.get(first, MISSING) if dot else MISSING
    if isinstance(inner, dict):
        return look_up(inner, rest)
    return None if inner is None else MISSING


def _kind(value: object) -> str:
    return KIND_NAMES.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _no_column(field: str, path: Path, place: str, columns: list[str]) -> RunError:
    names = [printable(name) for name in columns[:20]]
    fix = f"use one of {', '.join(names)}" if names else "repair that record"
    rule = f"is no column of {place}{printable(path)}"
    return RunError(
        Problem(
            field="text_field",
            value=printable(field),
            rule=rule,
            fix=fix,
        )
    )


def _unreadable(path: Path, rule: str) -> RunError:
    fix = "repair or leave out that file"
    return RunError(
        Problem(
            field="source",
            value=printable(path),
            rule=f"cannot be read: {rule}",
            fix=fix,
        )
    )
