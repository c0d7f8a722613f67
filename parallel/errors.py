"""What a user is told when something they typed, or their machine, cannot work."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a configuration: which field, its value, the rule it breaks, and what to do."""

    field: str
    value: object
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.field}={self.value} {self.rule}; {self.fix}"


class RunError(Exception):
    """An error for the user: printed in one box without a traceback; the process exits with code 2.

    Args:
        problems: all that is wrong, at once.
    """

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))
