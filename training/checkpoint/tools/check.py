"""Is a checkpoint whole? Files against their checksums, tensors against the manifest, every element
exactly once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.agree import ONE_PROCESS
from parallel.errors import Problem, RunError
from training.checkpoint.format import storage
from training.checkpoint.format.boxes import cover_problem
from training.checkpoint.format.problems import checkpoint_problem
from training.checkpoint.format.safe_unpickling import METADATA
from training.checkpoint.format.storage import COMPLETE, Manifest
from training.checkpoint.tools.reader import Reader

# Yields the names of files and shows how many are done.
Track = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class Verified:
    """What was found whole, for the report."""

    path: Path
    num_files: int
    num_bytes: int
    num_tensors: int


def verify(path: Path, track: Track = lambda files: files) -> Verified:
    """Read every byte of the checkpoint ``path``, on one process.

    Raises:
        RunError: every fault, with file and tensor, and which older checkpoint beside it is good.
    """
    problems = list(_faults(path, track))
    if not problems:
        manifest = storage.read_manifest(path)
        tensors = Reader(path).tensors
        total = sum(record["bytes"] for record in manifest["files"].values())
        return Verified(path, len(manifest["files"]), total, len(tensors))
    good = next((other for other in _older(path) if not list(_faults(other))), None)
    advice = (
        f"{good} is good: with {path.name} moved away, --resume takes it"
        if good
        else "of the older checkpoints none beside it is good"
    )
    raise RunError(*problems, advice)


def newest_named(path: Path) -> Path:
    """The newest checkpoint of a run by its number, complete or not; a checkpoint itself."""
    path = path if path.name else path.absolute()
    if COMPLETE.fullmatch(path.name):
        return path
    for directory in (path / "checkpoints", path):
        if found := _numbered(directory):
            return found[0]
    rule = "holds no checkpoint" if path.is_dir() else "does not exist"
    raise checkpoint_problem(
        path, rule, "name a run, as in runs/tiny, or a directory step-NNNNNNNN"
    )


def _numbered(directory: Path) -> list[Path]:
    """Directories named as checkpoints, newest first; one that is being replaced comes after its
    successor.
    """
    found = (
        [p for p in directory.iterdir() if COMPLETE.fullmatch(p.name)] if directory.is_dir() else []
    )
    return sorted(
        found,
        key=lambda p: (int(p.name[5:].removesuffix(".old")), p.suffix != ".old"),
        reverse=True,
    )


def _older(path: Path) -> list[Path]:
    beside = _numbered(path.parent)
    return beside[beside.index(path) + 1 :] if path in beside else beside


def _faults(path: Path, track: Track = lambda files: files) -> Iterable[Problem | str]:
    try:
        manifest = storage.read_manifest(path)
    except RunError as error:
        yield from error.problems
        return
    # DCP's metadata first: nothing unpickles it before it is known to be harmless.
    if METADATA not in manifest["files"]:
        yield _problem(path, f"is damaged: its manifest names no {METADATA}")
        return
    if _file_faults(path, manifest, [METADATA]):
        yield from _file_faults(path, manifest, list(manifest["files"]))
        return
    try:
        reader = Reader(path)
    except RunError as error:
        yield from error.problems
        return
    yield from _tensor_faults(path, reader)
    for name in track([name for name in sorted(manifest["files"]) if name != METADATA]):
        yield from _file_faults(path, manifest, [name])


def _file_faults(path: Path, manifest: Manifest, names: list[str]) -> list[Problem | str]:
    try:
        storage.verify(
            path,
            {**manifest, "files": {name: manifest["files"][name] for name in names}},
            ONE_PROCESS,
        )
    except RunError as error:
        return list(error.problems)
    return []


def _tensor_faults(path: Path, reader: Reader) -> Iterable[Problem | str]:
    """What contradicts the manifest, lies outside its files, or does not cover its tensor."""
    metadata = reader.manifest["tensors"]
    files = reader.manifest["files"]
    for name in sorted(metadata.keys() - reader.tensors.keys()):
        yield _problem(path, f"is damaged: {METADATA} lacks {name}")
    for name, tensor in reader.tensors.items():
        found = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if metadata.get(name) != found:
            yield _problem(
                path,
                f"is damaged: {name} is {found} in {METADATA}, {metadata.get(name)} in the "
                "manifest",
            )
        if (gap := cover_problem(tensor.shape, [chunk.box for chunk in tensor.chunks])) is not None:
            yield _problem(path, f"is damaged: {name}: {gap}")
        for chunk in tensor.chunks:
            if chunk.file not in files or chunk.offset + chunk.length > files[chunk.file]["bytes"]:
                yield _problem(path, f"is damaged: {name} lies outside {chunk.file}")


def _problem(path: Path, rule: str) -> Problem | str:
    return checkpoint_problem(path, rule).problems[0]
