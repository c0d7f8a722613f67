"""How much memory of this machine processes may still take. No torch in here: the command line
asks, too, before anything is imported.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

CGROUP = Path("sys/fs/cgroup")


class _Files(NamedTuple):
    """Where a version of control groups keeps a group's numbers."""

    mount: Path
    limit: str
    usage: str
    reclaimable: str
    """The entry of ``memory.stat``: page cache that nobody has used lately. The kernel drops it
    before it refuses memory, so it is free, though the group's usage counts it."""


VERSION_1 = _Files(
    mount=CGROUP / "memory",
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    reclaimable="total_inactive_file",
)
VERSION_2 = _Files(
    mount=CGROUP,
    limit="memory.max",
    usage="memory.current",
    reclaimable="inactive_file",
)


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that this process may still take, None where the system does not say.

    The least of what the kernel calls available and of what each control group that holds the
    process (of either version, nested ones too) leaves. Page cache that can be dropped is free.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    available = _available(root / "proc/meminfo")
    if available is None:
        return None
    left = [available]
    for group, files in _groups(root):
        group_left = _left(group, files)
        if group_left is not None:
            left.append(group_left)
    return max(0, min(left))


def _available(meminfo: Path) -> int | None:
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """The control groups that hold this process, with the files of their version.

    A limit binds all groups below its own. In a container the path may be the host's, and only the
    mount exists, which is then the container's own group: so the mount is asked, whatever the path.
    """
    membership = root / "proc/self/cgroup"
    lines = membership.read_text().splitlines() if membership.exists() else []
    paths = {VERSION_1: PurePosixPath(), VERSION_2: PurePosixPath()}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            paths[VERSION_2] = PurePosixPath(path.lstrip("/"))
        elif "memory" in controllers.split(","):
            paths[VERSION_1] = PurePosixPath(path.lstrip("/"))
    for files, innermost in paths.items():
        for group in (innermost, *innermost.parents):
            yield root / files.mount / group, files


def _left(group: Path, files: _Files) -> int | None:
    """What a group leaves; None where it is not there, or has no limit."""
    try:
        limit = (group / files.limit).read_text().strip()
        usage = int((group / files.usage).read_text())
    except OSError:
        return None
    if limit == "max":
        return None
    return int(limit) - usage + _reclaimable(group, files)


def _reclaimable(group: Path, files: _Files) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    entries = dict(line.split() for line in lines)
    return int(entries.get(files.reclaimable, 0))
