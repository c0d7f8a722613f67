"""A checkpoint's directory: complete or absent, with a manifest that proves it.

``step-00000100.tmp`` is written, synced and checksummed, then renamed to ``step-00000100`` at once.
A kill at any moment leaves what was complete before. ``step-00000100.old`` is a checkpoint that one
of the same step is replacing.
"""

import contextlib
import errno
import json
import os
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from parallel.agree import Comm, on_every_rank, on_rank_0
from parallel.errors import Problem, RunError
from training.checkpoint.format.checksums import Damage, find_damage
from training.checkpoint.format.problems import checkpoint_problem, told_for
from training.checkpoint.format.safe_unpickling import read_metadata

FORMAT = 2  # 1 had one CRC-32 a file
MANIFEST = "manifest.json"
COMPLETE = re.compile(r"step-(\d{8,})(\.old)?")
PARTIAL = re.compile(r"step-\d{8,}(\.old)?\.tmp")
# What a checkpoint needs beside its tensors to be used by itself.
ATTACHED = ("run.json", "metrics.jsonl", "tokenizer.json", "token_map.json", "engram_hash.json")
WRITTEN = re.compile(
    "|".join([r"__\d+_\d+\.distcp", r"\.metadata(\.tmp)?", *map(re.escape, (MANIFEST, *ATTACHED))])
)

Manifest = dict[str, Any]


def require_writable(directory: Path) -> None:
    """Find out before training what the first save would.

    Raises:
        RunError: ``directory`` cannot be made, or written to.
    """
    with told_for(directory, "written"):
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


def start_directory(directory: Path, step: int) -> Path:
    """A fresh ``step-N.tmp``; what killed saves left in ``directory`` is removed, files of others
    stay.

    Raises:
        RunError: it holds files that no save writes, or cannot be made.
    """
    path = directory / f"step-{step:08d}.tmp"
    with told_for(path, "written"):
        directory.mkdir(parents=True, exist_ok=True)
        for left in [
            left for left in directory.iterdir() if PARTIAL.fullmatch(left.name) and left.is_dir()
        ]:
            discard(left)
        try:
            path.mkdir()
        except FileExistsError:
            foreign = ", ".join(sorted(file.name for file in path.iterdir()))
            raise checkpoint_problem(
                path, f"holds files that no save writes: {foreign}", "move them away"
            ) from None
    return path


def discard(path: Path) -> None:
    """Delete what a save has written into a directory that it cannot complete; files of others
    stay.
    """
    _remove(path, [file.name for file in path.iterdir() if WRITTEN.fullmatch(file.name)])


def attach(path: Path, files: Mapping[str, bytes]) -> list[str]:
    """Write files of ATTACHED into an unfinished checkpoint, synced to disk; their names."""
    for name, content in files.items():
        assert name in ATTACHED, f"{name} would not be removed with what a killed save leaves"
        with open(path / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return list(files)


def commit(path: Path, manifest: Manifest) -> Path:
    """Write the manifest, sync the directory and give it its final name; a checkpoint of that name
    is replaced.

    Returns:
        The final path.
    """
    final = path.with_suffix("")
    old = final.with_name(final.name + ".old")
    with told_for(final, "written"):
        with open(path / MANIFEST, "w") as file:
            json.dump(manifest | {"checksum": _manifest_checksum(manifest)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(path)
        if final.exists():
            _remove_replaced(old)
            os.rename(final, old)
        os.rename(path, final)
        _sync_directory(path.parent)
        _remove_replaced(old)
    return final


def read_manifest(path: Path) -> Manifest:
    """The manifest of a complete checkpoint; sizes of its files are not looked at.

    Raises:
        RunError: no checkpoint, an incomplete or damaged one, or one of a newer format.
    """
    if not path.exists():
        raise checkpoint_problem(path, "does not exist", "name a directory step-NNNNNNNN that does")
    if not COMPLETE.fullmatch(path.name) or not path.is_dir():
        raise checkpoint_problem(
            path, "is no complete checkpoint", "name a directory step-NNNNNNNN"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        checksum = manifest.pop("checksum")
        newer = manifest["format"] > FORMAT
    except FileNotFoundError:
        raise checkpoint_problem(path, f"is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise checkpoint_problem(
            path, f"is damaged: {MANIFEST} cannot be read ({error})"
        ) from error
    if newer:
        raise checkpoint_problem(
            path,
            f"has format {manifest['format']}, newer than {FORMAT}",
            "use the version of this code that wrote it",
        )
    if checksum != _manifest_checksum(manifest):
        raise checkpoint_problem(path, f"is damaged: {MANIFEST} differs from its checksum")
    return manifest


def latest(directory: Path, comm: Comm) -> Path | None:
    """The newest complete checkpoint in ``directory``; None where there is none. Collective."""
    return on_rank_0(comm, lambda: next(iter(_complete(directory)), None))


def passed_over(directory: Path, chosen: Path | None) -> list[str]:
    """Later than the checkpoint ``chosen``, in words: what has the name of a complete one, and is
    none.
    """
    return [
        f"passed over {path}: it {defect}"
        for path, defect in _incomplete(directory, chosen).items()
    ]


@dataclass(frozen=True)
class Choice:
    """What a run can go on from."""

    path: Path | None
    """The newest checkpoint that is whole, byte by byte; None where none is."""
    defects: dict[Path, str]
    """What has the name of a later checkpoint and cannot be used, and why."""


def choose_whole(directory: Path, comm: Comm) -> Choice:
    """The newest checkpoint whose every byte is as it was written; later ones are passed over.
    Collective.

    Raises:
        RunError: on every rank: ``directory`` cannot be read.
    """
    damaged: dict[Path, str] = {}
    chosen = None
    for path in on_rank_0(comm, lambda: _complete(directory)):
        try:
            verify(path, on_rank_0(comm, partial(read_manifest, path)), comm)
        except RunError as error:
            damaged[path] = _rules(error)
        else:
            chosen = path
            break
    return Choice(chosen, damaged | on_rank_0(comm, lambda: _incomplete(directory, chosen)))


def prune(
    directory: Path,
    keep: int,
    comm: Comm,
    keep_every: int = 0,
    spared: Collection[Path] = frozenset(),
) -> None:
    """Delete all but the ``keep`` newest complete checkpoints and every ``keep_every``-th step's.
    Collective.

    Only files that their manifests name; what else lies there stays.

    Args:
        spared: checkpoints that are neither deleted nor counted as kept.
    """
    if keep < 1:
        raise RunError(
            Problem(
                field="train.keep",
                value=keep,
                rule="is below 1",
                fix="keep at least one checkpoint",
            )
        )

    def remove() -> None:
        for path in [path for path in _complete(directory) if path not in spared][keep:]:
            if not keep_every or _step(path) % keep_every:
                with told_for(path, "deleted"):
                    _remove_checkpoint(path)

    on_rank_0(comm, remove)


def verify(path: Path, manifest: Manifest, comm: Comm) -> None:
    """Compare all files with the manifest, each rank a share. Collective.

    Raises:
        RunError: on every rank, each damaged file with the tensors that it damages.
    """
    names = sorted(manifest["files"])

    def damages() -> dict[str, Damage]:
        found = {
            name: find_damage(path / name, manifest["files"][name])
            for name in names[comm.rank :: comm.size]
        }
        return {name: damage for name, damage in found.items() if damage is not None}

    damaged = {
        name: damage
        for share in comm.allgather(on_every_rank(comm, damages))
        for name, damage in share.items()
    }

    def report() -> None:
        rules = [
            f"is damaged: {name} {damaged[name].what}{_holding(path, name, damaged)}"
            for name in sorted(damaged)
        ]
        raise RunError(*(checkpoint_problem(path, rule).problems[0] for rule in rules))

    if damaged:
        on_rank_0(comm, report)


def _complete(directory: Path) -> list[Path]:
    """Complete checkpoints, newest first: their manifests are whole and all files have
    their sizes.
    """
    found = [path for path in _named(directory) if _defect(path) is None]
    return sorted(found, key=_age, reverse=True)


def _incomplete(directory: Path, chosen: Path | None) -> dict[Path, str]:
    """What has the name of a checkpoint later than ``chosen`` and is none, oldest first, with its
    defect.
    """
    later = [path for path in _named(directory) if chosen is None or _age(path) > _age(chosen)]
    defects = {path: _defect(path) for path in sorted(later, key=_age)}
    return {path: defect for path, defect in defects.items() if defect}


def _named(directory: Path) -> list[Path]:
    """What has the name of a complete checkpoint."""
    with told_for(directory, "read"):
        return (
            [path for path in directory.iterdir() if COMPLETE.fullmatch(path.name)]
            if directory.is_dir()
            else []
        )


def _defect(path: Path) -> str | None:
    """Why a directory is no complete checkpoint, but for damage inside its files, or None."""
    try:
        files = read_manifest(path)["files"]
    except RunError as error:
        return _rules(error)
    damages = {
        name: find_damage(path / name, record, content=False) for name, record in files.items()
    }
    return next(
        (f"is incomplete: {name} {damage.what}" for name, damage in damages.items() if damage), None
    )


def _rules(error: RunError) -> str:
    """What is wrong, as the end of a sentence about the checkpoint."""
    return "; ".join(
        problem.rule if isinstance(problem, Problem) else problem for problem in error.problems
    )


def _age(path: Path) -> tuple[int, bool]:
    """Orders checkpoints; one that another of the same step replaces comes before that."""
    return _step(path), path.suffix != ".old"


def _step(path: Path) -> int:
    return int(path.name[5:].removesuffix(".old"))


def _holding(path: Path, name: str, damaged: dict[str, Damage]) -> str:
    """The tensors that a damaged file damages, as the end of a sentence."""
    if ".metadata" in damaged:
        return ""
    tensors = sorted(
        {
            index.fqn
            for index, place in read_metadata(path).storage_data.items()
            if place.relative_path == name
            and any(
                start < place.offset + place.length and place.offset < stop
                for start, stop in damaged[name].spans
            )
        }
    )
    listed = ", ".join(tensors[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")
    return f" (in {listed})" if tensors else ""


def _manifest_checksum(manifest: Manifest) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint: first its name, so that it is never incomplete under it, then the files
    of its manifest.
    """
    try:
        files = [name for name in read_manifest(path)["files"] if WRITTEN.fullmatch(name)]
    except RunError:
        return  # not ours to delete
    gone = path.with_name(path.name + ".tmp")
    os.rename(path, gone)
    _remove(gone, [*files, MANIFEST])
    if gone.exists():  # files of others: they stay where they were
        os.rename(gone, path)


def _remove_replaced(path: Path) -> None:
    """Delete a checkpoint in whose place there is a whole one now; of a damaged one too what a save
    has written.
    """
    _remove_checkpoint(path)
    if path.is_dir():
        discard(path)


def _remove(path: Path, names: list[str]) -> None:
    for name in names:
        (path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()
