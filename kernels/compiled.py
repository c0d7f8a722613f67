"""Elementwise pieces that torch.compile may fuse: eager, or compiled where a run asks for it.

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
    """Switch compilation of all pieces on or off for this process.

    A piece is compiled at its first call with each shape.
    """
    global _enabled
    _enabled = enabled


def compiler_problem() -> str:
    """Why torch.compile does not work on this CPU; empty where it does.

    It compiles a function, some seconds at the first start: that a compiler is there says little,
    it may lack headers, or C++20.
    """
    try:
        torch.compile(_twice, dynamic=False)(torch.ones(8))
    except Exception as error:
        return _first_lines(str(error))
    return ""


def _first_lines(message: str) -> str:
    """What failed and the compiler's first line about it, without the pages that follow."""
    summary, _, output = message.partition("Output:")
    what, _, _ = summary.partition("\n")
    paragraph, _, _ = output.partition("\n\n")
    line, _, _ = paragraph.strip().partition("\n")
    return ": ".join(part for part in (what, line) if part)


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
