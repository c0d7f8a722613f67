"""Elementwise pieces that torch.compile may fuse: eager by default, compiled when a run asks for
it.

Whole models are not compiled: routing breaks the graph. The pieces are pure functions of tensors.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_enabled = False


def compile_pieces(enabled: bool) -> None:
    """Switch compilation of all pieces on or off for this process; it happens at each piece's first
    call per shape.
    """
    global _enabled
    _enabled = enabled


def compiler_problem() -> str:
    """Why torch.compile does not work on this CPU; empty where it does. Some seconds at the first
    start: it compiles.

    That a compiler is there says little: it may lack headers, or C++20.
    """
    try:
        torch.compile(_twice, dynamic=False)(torch.ones(8))
    except Exception as error:
        name, _, output = str(error).partition("Output:")
        first, *_ = [*output.split("\n\n")[0].strip().splitlines(), ""]
        return ": ".join(part for part in (name.partition("\n")[0], first) if part)
    return ""


def _twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def piece(fn: Callable[P, R]) -> Callable[P, R]:
    """Mark a pure function of tensors as fusible."""

    @functools.cache
    def compiled() -> Callable[P, R]:
        return torch.compile(fn, dynamic=False)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled()(*args, **kwargs) if _enabled else fn(*args, **kwargs)

    return call
