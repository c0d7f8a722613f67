"""Compiled loops in several threads: they run without the interpreter lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch

FEW_ROWS = 512
Share = TypeVar("Share")


def for_each(task: Callable[[Share], object], shares: Sequence[Share]) -> None:
    """Call ``task`` on every share, in as many threads as PyTorch uses;
    raises what a call raises.
    """
    threads = min(torch.get_num_threads(), len(shares))
    if threads > 1:
        list(_pool(threads, os.getpid()).map(task, shares))
        return
    for share in shares:
        task(share)


def for_ranges(task: Callable[[slice], object], count: int) -> None:
    """Call ``task`` on contiguous ranges that make up ``count`` rows; few rows are not worth a
    second thread.
    """
    threads = torch.get_num_threads() if count > FEW_ROWS else 1
    for_each(
        task,
        [
            slice(low, high)
            for low, high in pairwise(count * i // threads for i in range(threads + 1))
        ],
    )


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork: each process has its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="compiled-loops")
