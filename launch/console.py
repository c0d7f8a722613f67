"""What a user sees of an error: one box on stderr."""

import time

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from parallel.errors import RunError

USER_ERROR = 2
# A launcher ends all processes once one has ended: long enough for a busy machine's rank 0 to have
# its say.
LISTEN_S = 10.0


def report(error: RunError, title: str = "cannot run") -> int:
    """Print every problem of ``error`` in one box, without a traceback; returns the exit code."""
    lines = "\n".join(f"• {escape(str(problem))}" for problem in error.problems)
    Console(stderr=True).print(
        Panel(
            lines,
            title=title,
            border_style="red",
            title_align="left",
        )
    )
    return USER_ERROR


def leave_to_rank_0() -> int:
    """The exit code of a rank whose error rank 0 tells, after giving it the time; rank 0's end ends
    this wait.
    """
    time.sleep(LISTEN_S)
    return USER_ERROR
