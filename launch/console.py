"""What a user sees of an error: one box on stderr."""

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from parallel.errors import RunError

USER_ERROR = 2


def report(error: RunError, title: str = "cannot run") -> int:
    """Print every problem of ``error`` in one box, without a traceback; returns the exit code."""
    lines = "\n".join(f"• {escape(str(problem))}" for problem in error.problems)
    Console(stderr=True).print(Panel(lines, title=title, border_style="red", title_align="left"))
    return USER_ERROR
