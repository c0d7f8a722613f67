"""Which files a source names: exactly those, each once, and why others are left out."""

import glob
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from parallel.errors import Problem, RunError

STDLIB = "stdlib"
# Suffix -> reader.
KINDS = {
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".py": "text",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
MAX_REASONS = 10  # that are told apart
# What stands for a data set of the hub where no such path exists; anything else can only be a path.
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that will be read, and how."""

    path: Path
    kind: str
    """Kind of the file: jsonl, parquet or text."""
    compression: str = ""
    """The suffix that tells how it is compressed; empty where it is not."""
    size: int
    """Size of the file in bytes, as it lies on disk."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files that one ``--source`` names."""

    name: str
    files: tuple[SourceFile, ...] = ()
    """In the order in which they are read."""
    on_hub: bool = False
    """Whether it is a data set of the Hugging Face hub."""


@dataclass(kw_only=True)
class Taken:
    """What the sources before have taken, and what was left out."""

    places: set[str] = field(default_factory=set)
    """Real paths of the files that are read, and names of data sets of the hub."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Why something was left out -> how often."""


def find_sources(names: Sequence[str]) -> tuple[list[Source], Counter[str]]:
    """The files that each name stands for, and how many others were left out for which reason.

    Raises:
        RunError: every name that stands for nothing that can be read.
    """
    taken = Taken()
    sources: list[Source] = []
    problems: list[Problem | str] = []
    for name in names:
        try:
            sources.append(_find_source(name, taken))
        except RunError as error:
            problems += error.problems
        except OSError as error:
            where = printable(error.filename or name)
            problems.append(
                _problem(
                    where, f"cannot be read: {error.strerror}", "make it readable, or leave it out"
                )
            )
    if problems:
        raise RunError(*problems)
    told = Counter(dict(taken.ignored.most_common(MAX_REASONS)))
    if rest := taken.ignored.total() - told.total():
        told["of other kinds"] = rest
    return sources, told


def printable(name: object) -> str:
    """A path for a message: as it is, or escaped where it holds what a terminal cannot show."""
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return text if text.isprintable() else repr(text)


def standard_library_files() -> list[Path]:
    """Source files of this interpreter's standard library, by path: its tests too, no
    site-packages.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts)
    foreign = {"site-packages", "dist-packages"}
    return [path for path in paths if not foreign & set(path.relative_to(root).parts)]


def _find_source(name: str, taken: Taken) -> Source:
    if name == STDLIB:
        files = [
            SourceFile(path=path, kind="text", size=path.stat().st_size)
            for path in standard_library_files()
        ]
        return Source(name=name, files=tuple(_each_once(files, taken)))
    paths = _named_paths(name)
    if not paths:
        if name in taken.places:
            taken.ignored["given twice"] += 1
            return Source(name=name)
        taken.places.add(name)
        return Source(name=name, on_hub=True)
    left_out: dict[Path, str] = {}
    found = {file.path: file for path in paths for file in _files_at(path, left_out)}
    ignored = Counter(left_out.values())
    if not found:
        raise RunError(
            _problem(name, _nothing_found(ignored), "name a file or directory that holds text")
        )
    taken.ignored += ignored
    return Source(
        name=name, files=tuple(_each_once([found[path] for path in sorted(found)], taken))
    )


def _each_once(files: Sequence[SourceFile], taken: Taken) -> Iterator[SourceFile]:
    """Those of ``files`` that have not been taken under this or another name."""
    for file in files:
        real = os.path.realpath(file.path)
        if real in taken.places:
            taken.ignored["given twice"] += 1
            continue
        taken.places.add(real)
        yield file


def _named_paths(name: str) -> list[Path]:
    """The paths that ``name`` is, or that it is a pattern of; none where it can only be a data set
    of the hub.
    """
    path = Path(name if os.path.lexists(name) else os.path.expanduser(name))
    if os.path.lexists(path):
        if not path.exists():
            rule = f"is a link to {printable(os.readlink(path))}, which does not exist"
            raise RunError(_problem(name, rule, "correct the link"))
        return [path]
    if glob.has_magic(name):
        anchor = Path(path.anchor)
        parts = path.parts[1:] if path.anchor else path.parts
        if matches := list(_expand(anchor, parts)):
            return matches
        raise RunError(_problem(name, "is no path, and as a pattern it matches none", "correct it"))
    if not HUB_NAME.fullmatch(name) or _split_suffix(name)[0] in KINDS:
        raise RunError(
            _problem(name, "does not exist", "correct the path; patterns know *, ?, [] and **")
        )
    return []


def _expand(root: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Paths under ``root`` that match; in each directory a name that exists as it is written is no
    pattern.
    """
    if not parts:
        yield root
        return
    part = parts[0]
    rest = parts[1:]
    if os.path.lexists(root / part):
        yield from _expand(root / part, rest)
    elif part == "**":
        for directory in _directories(root, {}):
            yield from _expand(directory, rest)
    elif glob.has_magic(part) and root.is_dir():
        for name in sorted(os.listdir(root)):
            if fnmatchcase(name, part) and (part.startswith(".") or not _is_hidden(name)):
                yield from _expand(root / name, rest)


def _files_at(path: Path, left_out: dict[Path, str]) -> Iterator[SourceFile]:
    """The file ``path``, or what is to be read below the directory ``path``."""
    if path.is_dir():
        for directory in _directories(path, left_out):
            for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
                if not _is_hidden(entry.name) and not os.path.isdir(entry.path):
                    yield from _file_at(directory / entry.name, left_out)
    else:
        yield from _file_at(path, left_out)


def _directories(root: Path, left_out: dict[Path, str]) -> Iterator[Path]:
    """``root`` and the directories below that are not hidden, each once: links are followed after
    all others.
    """
    seen: set[str] = set()
    waiting = [root]
    while waiting:
        directory = waiting.pop(0)
        real = os.path.realpath(directory)
        if real in seen:
            continue
        seen.add(real)
        yield directory
        below: list[Path] = []
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if _is_hidden(entry.name):
                left_out[directory / entry.name] = "hidden"
            elif entry.is_dir(follow_symlinks=False):
                below.append(directory / entry.name)
            elif os.path.isdir(entry.path):
                waiting.append(directory / entry.name)
        waiting = below + waiting


def _file_at(path: Path, left_out: dict[Path, str]) -> Iterator[SourceFile]:
    """The file at ``path``, or nothing and the reason."""
    suffix, compression = _split_suffix(path.name)
    kind = KINDS.get(suffix)
    if not path.exists():
        left_out[path] = "dangling link"
    elif not path.is_file():
        left_out[path] = "no regular file"
    elif kind is None or (kind == "parquet" and compression):
        left_out[path] = printable(suffix + compression) or "without a suffix"
    elif not (size := path.stat().st_size):
        left_out[path] = "empty"
    else:
        yield SourceFile(
            path=path,
            kind=kind,
            compression=compression,
            size=size,
        )


def _split_suffix(name: str) -> tuple[str, str]:
    """(".jsonl", ".gz") of ``A.JSONL.gz``: suffixes count in any case."""
    path = Path(name.lower())
    compression = ""
    if path.suffix in COMPRESSIONS:
        path, compression = Path(path.stem), path.suffix
    return path.suffix, compression


def _is_hidden(name: str) -> bool:
    """Whether nobody means this file or directory when naming the one that holds it."""
    return name.startswith(".") or name == "__pycache__"


def _nothing_found(ignored: Counter[str]) -> str:
    rule = f"has no file with text in {', '.join(KINDS)}"
    return f"{rule} (ignored: {counted(ignored)})" if ignored else rule


def counted(reasons: Mapping[str, int]) -> str:
    """How often each, in words: ``1 empty, 3 .csv``."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def _problem(name: str, rule: str, fix: str) -> Problem:
    return Problem(
        field="source",
        value=printable(name),
        rule=rule,
        fix=fix,
    )
