"""Compiled loops in several threads: they run without the interpreter lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Share = TypeVar("Share")


def for_each(task: Callable[[Share], object], shares: Sequence[Share]) -> None:
    """Call ``task`` on every share, in as many threads as PyTorch uses; raises what a call raises."""
    threads = min(torch.get_num_threads(), len(shares))
    if threads > 1:
        list(_pool(threads, os.getpid()).map(task, shares))
        return
    for share in shares:
        task(share)


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork: each process has its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="compiled-loops")
