"""A progress bar on a terminal, a few plain lines elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
NUM_LINES = 4  # of a piece of work, where there is no terminal


def track(items: Iterable[T], total: int, label: str, show: bool = True) -> Iterator[T]:
    """Yield ``items`` and report on stderr how many of ``total`` are done; silent unless ``show``."""
    if not show:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, label, total, console=Console(stderr=True))
    else:
        for done, item in enumerate(items, 1):
            yield item
            if done * NUM_LINES // total > (done - 1) * NUM_LINES // total:
                print(f"{label}: {100 * done // total}%", file=sys.stderr, flush=True)
