"""What a user is told when something they typed, or their machine, cannot work."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a configuration: which field, its value, the rule it breaks, and
    what to do.
    """

    field: str
    value: object
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.field}={self.value} {self.rule}; {self.fix}"


def nearest(word: str, known: Iterable[str], otherwise: str, before: str = "") -> str:
    """What to do about an unknown word: the known one that resembles it, after ``before``, or
    ``otherwise``.
    """
    near = get_close_matches(word, sorted(known), n=1)
    return f"did you mean {before}{near[0]}?" if near else otherwise


class RunError(Exception):
    """An error for the user: printed in one box without a traceback; the process exits with code 2.

    Args:
        problems: all that is wrong, at once.
    """

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class LostRun(RunError):
    """Another process has taken over what this one was writing: nothing of it may be touched any
    more.
    """
