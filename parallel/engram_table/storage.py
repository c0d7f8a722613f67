"""The kinds of memory that a rank's rows live in, and whether there is enough of it before any is taken."""

import mmap
import os
import shutil
import tempfile
from math import prod
from pathlib import Path

import torch

from parallel.engram_table.memory import available_host_bytes, check_memory, host_zeros
from parallel.engram_table.store import Allocate
from parallel.errors import Problem, RunError
from parallel.mesh import Mesh
from parallel.table_config import TableConfig, row_bytes, state_bytes


def open_storage(
    config: TableConfig, num_rows: int, width: int, device: torch.device, what: str, mesh: Mesh
) -> tuple[torch.device, Allocate]:
    """Where rows live, and the function that allocates there. Collective over ``engram``.

    Args:
        num_rows: of this rank.
        what: the size of all tables, for the message.

    Raises:
        RunError: on every rank, when a node has too little memory or disk.
    """
    needed = num_rows * (row_bytes(config.rows, width) + state_bytes(config.optimizer, width))
    if config.placement == "file":
        directory = Path(config.directory)
        _check_directory(directory)
        check_memory(needed, shutil.disk_usage(directory).free, f"disk at {directory}", what, mesh)
        return torch.device("cpu"), lambda name, shape, dtype: file_zeros(directory, name, shape, dtype)
    if config.placement == "host":
        check_memory(needed, available_host_bytes(), "host memory", what, mesh)
        return torch.device("cpu"), lambda name, shape, dtype: host_zeros(shape, dtype)
    available = None if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]
    check_memory(needed, available, f"memory of {device}", what, mesh)
    return device, lambda name, shape, dtype: torch.zeros(shape, dtype=dtype, device=device)


def file_zeros(directory: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in a file without a name, mapped into memory: the kernel keeps in RAM what is used.

    The disk's blocks are allocated before the file is mapped: a sparse mapping would die of SIGBUS on a full disk. The
    file vanishes with the process, however it ends; it may be written back at any time, so it is no checkpoint.

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
        raise RunError(_directory_problem(directory, f"cannot hold {num_bytes:,} bytes: {error.strerror}")) from error
    pages.madvise(mmap.MADV_RANDOM)  # a row is less than a page: reading ahead would fetch its neighbours
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _check_directory(directory: Path) -> None:
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise RunError(_directory_problem(directory, "is not a directory that this process may write to"))


def _directory_problem(directory: Path, rule: str) -> Problem:
    return Problem(field="table.directory", value=str(directory), rule=rule, fix="name a directory on a disk with room")
