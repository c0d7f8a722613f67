"""A verb's request from what was typed, together with all that is wrong with the words."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from launch.option_values import field_types, read_words
from parallel.errors import Problem, nearest

T = TypeVar("T")


def read_request(
    kind: type[T], argv: list[str], parse: Callable[[list[str]], T], prefix: str = ""
) -> tuple[T, list[Problem]]:
    """The request in ``argv``, without the words that are wrong, and what is wrong with these.

    Args:
        kind: dataclass of the request; all its fields have defaults.
        parse: gives the request in words that it can read.
        prefix: of fields' names in problems.
    """
    types = field_types(kind)
    switches = ["help"]
    for name, hint in types.items():
        if hint is bool:
            switches += [name, f"no_{name}"]

    def meant(name: str) -> str:
        return nearest(
            name,
            types,
            "--help lists them",
            "--",
        )

    words, problems = read_words(
        argv,
        types,
        switches,
        meant,
    )
    told = []
    for problem in problems:
        if problem.field in types:
            problem = replace(problem, field=prefix + problem.field)
        told.append(problem)
    return parse(words), told
