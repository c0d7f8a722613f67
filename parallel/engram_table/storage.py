"""The kinds of memory that a rank's rows live in, and whether there is enough of it before any is
taken.
"""

import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import torch

from parallel.agree import GroupComm, raised_alike
from parallel.engram_table.store import Allocate
from parallel.errors import Problem, RunError
from parallel.free_memory import free_host_bytes
from parallel.host_memory import check_memory, host_zeros, locked_zeros
from parallel.mesh import Mesh
from parallel.table_bytes import TableBytes, table_bytes
from parallel.table_config import TableConfig


def open_storage(
    config: TableConfig,
    num_rows: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    what: str,
    mesh: Mesh,
    trainable: bool = True,
) -> tuple[torch.device, Allocate]:
    """Where rows live, and the function that allocates there. Collective over ``engram``.

    Args:
        num_rows: of this rank.
        device: where the model computes, and hot rows are kept.
        dtype: in which they are.
        what: the size of all tables, for the message.
        trainable: there will be optimizer state beside the rows, and hot rows if there are to be
            any.

    Raises:
        RunError: on every rank, when a node has too little memory or disk, or the directory is not
            there on one.
    """
    if config.placement == "pinned" and trainable and device.type != "cuda":
        rule = (
            f"needs a CUDA device, and this process computes on {device}: pages are locked for "
            "a card's copies"
        )
        raise RunError(_placement_problem(rule))
    needs = table_bytes(
        config,
        num_rows,
        width,
        value_bytes=dtype.itemsize,
        on_card=device.type != "cpu",
        trainable=trainable,
    )
    kept = "rows and optimizer state" if trainable else "rows"
    if trainable and config.hot_rows:
        _check_hot_rows(config, needs, device, mesh)
    if config.placement == "file":
        directory = Path(config.directory)
        _check_disk(needs.disk, directory, what, kept, mesh)
        return torch.device("cpu"), partial(file_zeros, directory)
    if config.placement == "device":
        place = f"memory of {device}"
        check_memory(needs.device, _free_bytes(device), place, what, mesh, kept)
        return device, partial(_device_zeros, device)
    check_memory(needs.host, free_host_bytes(), "host memory", what, mesh, kept)
    locked = config.placement == "pinned" and device.type == "cuda"
    return torch.device("cpu"), _or_told(pinned_zeros if locked else host_zeros, what)


def _check_hot_rows(
    config: TableConfig, needs: TableBytes, device: torch.device, mesh: Mesh
) -> None:
    """Hot rows beside a file, and on a card; in host memory beside rows they are counted with them.
    Collective over ``engram``, as what is asked follows from the configuration.
    """
    check = partial(
        check_memory,
        what=f"{config.hot_rows:,}",
        mesh=mesh,
        kept="hot rows",
        field="table.hot_rows",
        fix="keep fewer, or 0",
    )
    if device.type != "cpu":
        check(needs.hot_on_device, _free_bytes(device), f"memory of {device}")
    if config.placement == "file":
        check(needs.hot_on_host, free_host_bytes(), "host memory")


def _check_disk(needed: int, directory: Path, what: str, kept: str, mesh: Mesh) -> None:
    """That the files' directory is there, and its disk has room. Collective over ``engram``."""
    with raised_alike(GroupComm(mesh.group("engram"))):
        _check_directory(directory)
    check_memory(
        needed,
        shutil.disk_usage(directory).free,
        f"disk at {directory}",
        what,
        mesh,
        kept,
        fix="use a smaller table, another table.directory, or more nodes",
    )


def _device_zeros(
    device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _or_told(zeros: Callable[[tuple[int, ...], torch.dtype], torch.Tensor], what: str) -> Allocate:
    """Memory that is free and that the process may not have (ulimit -v, no overcommit) is the
    user's to know, too.
    """

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        try:
            return zeros(shape, dtype)
        except OSError as error:
            rule = (
                f"cannot have {prod(shape) * dtype.itemsize:,} bytes of host memory: "
                f"{error.strerror}"
            )
            fix = "use a smaller table, or allow the process more (ulimit -v, vm.overcommit_memory)"
            problem = Problem(
                field="model.engram.table_size", value=f"({what})", rule=_here(rule), fix=fix
            )
            raise RunError(problem) from error

    return allocate


def _free_bytes(device: torch.device) -> int | None:
    """Of the device's memory, which is the host's on a CPU."""
    if device.type == "cpu":
        return free_host_bytes()
    free, _ = torch.accelerator.get_memory_info(device)
    return free


def pinned_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in host memory whose pages are locked.

    Raises:
        RunError: CUDA refuses.
    """
    try:
        return locked_zeros(shape, dtype)
    except RuntimeError as error:
        raise RunError(
            _placement_problem(f"cannot lock {prod(shape) * dtype.itemsize:,} bytes: {error}")
        ) from error


def _placement_problem(rule: str) -> Problem:
    return Problem(
        field="table.placement",
        value="pinned",
        rule=_here(rule),
        fix='use "host"',
    )


def file_zeros(
    directory: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Zeros in a file without a name, mapped into memory: the kernel keeps in RAM what is used.

    The disk's blocks are allocated before the file is mapped: a sparse mapping would die of SIGBUS
    on a full disk. The file vanishes with the process, however it ends; it may be written back at
    any time, so it is no checkpoint.

    Raises:
        RunError: the disk refuses.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.zeros(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=f"engram-{name}-") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            pages = mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise RunError(
            _directory_problem(directory, f"cannot hold {num_bytes:,} bytes: {error.strerror}")
        ) from error
    # A row is less than a page: reading ahead would fetch its neighbours.
    pages.madvise(mmap.MADV_RANDOM)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _check_directory(directory: Path) -> None:
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise RunError(
            _directory_problem(directory, "is not a directory that this process may write to")
        )


def _directory_problem(directory: Path, rule: str) -> Problem:
    fix = "name a directory on a disk with room"
    return Problem(
        field="table.directory",
        value=str(directory),
        rule=_here(rule),
        fix=fix,
    )


def _here(rule: str) -> str:
    return f"{rule} (on {socket.gethostname()})"  # another rank may tell it
