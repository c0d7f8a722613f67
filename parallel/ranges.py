"""Ranges of numbers, stated in the types of a configuration's fields, and the one check of them.

No torch in here: the CLI imports it. ``Range`` is our own and not pydantic's, which would refuse a
saved configuration before a value that was typed over it has been read, and one layer of problems
at a time.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from parallel.errors import Problem

LARGEST = 2**63 - 1  # what tensors and files hold of whole numbers
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers that a field may hold: at least ``ge`` or above ``gt``, at most ``le`` or below
    ``lt``; always finite, and of 64 bits if whole. A tuple of them is not empty.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    fix: str = ""
    """What to do about a value outside; by default the range or the field's default is named."""

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies in the range; NaN lies in none."""
        if isinstance(value, int) and abs(value) > LARGEST:
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return not self._is_below(value) and not self._is_above(value)

    def _is_below(self, value: float) -> bool:
        if self.ge is not None and value < self.ge:
            return True
        return self.gt is not None and value <= self.gt

    def _is_above(self, value: float) -> bool:
        if self.le is not None and value > self.le:
            return True
        return self.lt is not None and value >= self.lt

    def __str__(self) -> str:
        """Its bounds in words, as in "0 or more and below 1"."""
        words = []
        if self.ge is not None:
            words.append(f"{self.ge} or more")
        if self.gt is not None:
            words.append(f"above {self.gt}")
        if self.le is not None:
            words.append(f"at most {self.le}")
        if self.lt is not None:
            words.append(f"below {self.lt}")
        return " and ".join(words)

    def broken_by(self, value: float, *, whole: bool) -> str:
        """The rule that a number outside of the range breaks, for a field of ``whole`` numbers or
        others.
        """
        if not whole:
            rule = f"must be {self}"
            is_bounded = self.le is not None or self.lt is not None
            return rule if is_bounded else f"{rule}, and finite"
        if self._is_below(value):
            return f"is below {self.ge}"
        largest = LARGEST if self.le is None else self.le
        return f"is above {largest}"


Count = Annotated[int, Range(ge=1)]
Natural = Annotated[int, Range(ge=0)]
Seconds = Annotated[int, Range(ge=1, le=10**8)]  # three years; clocks in nanoseconds end at 292
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
PositiveShare = Annotated[float, Range(gt=0, le=1)]
DecayRate = Annotated[float, Range(ge=0, lt=1)]


class _Unknown:
    """A number that is not known, as what was typed cannot be.

    Arithmetic with it gives itself and no comparison with it holds. So a rule that is written as
    "if this holds, it is broken" is not told where it would take such a number.
    """

    def _unknown(self, *_: object) -> "_Unknown":
        return self

    def _does_not_hold(self, _: object) -> bool:
        return False

    __add__ = _unknown
    __radd__ = _unknown
    __sub__ = _unknown
    __rsub__ = _unknown
    __mul__ = _unknown
    __rmul__ = _unknown
    __floordiv__ = _unknown
    __rfloordiv__ = _unknown
    __truediv__ = _unknown
    __rtruediv__ = _unknown
    __mod__ = _unknown
    __rmod__ = _unknown

    __lt__ = _does_not_hold
    __le__ = _does_not_hold
    __gt__ = _does_not_hold
    __ge__ = _does_not_hold
    __eq__ = _does_not_hold
    __ne__ = _does_not_hold
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())


UNKNOWN: Any = _Unknown()


def range_problems(config: object, prefix: str = "") -> list[Problem]:
    """Every number of a configuration, nested ones included, that is outside of its field's range.

    Args:
        config: a dataclass.
        prefix: of the fields' names, ``data.`` or ``--``.
    """
    problems = []
    for field, value, hint in _typed_fields(config):
        if is_dataclass(value):
            problems += range_problems(value, f"{prefix}{field.name}.")
        elif (told := _problem(field, value, hint, prefix)) is not None:
            problems.append(told)
    return problems


def known(config: T) -> T:
    """``config`` with ``UNKNOWN`` in place of the numbers that are outside of their ranges."""
    changes = {}
    for field, value, hint in _typed_fields(config):
        if is_dataclass(value):
            changes[field.name] = known(value)
        elif _problem(field, value, hint) is not None:
            changes[field.name] = UNKNOWN
    return replace(config, **changes)  # type: ignore[type-var]


def untold(problems: Iterable[Problem], told: Iterable[Problem]) -> list[Problem]:
    """Those of ``problems`` whose fields are not among the ``told``."""
    names = {problem.field for problem in told}
    return [problem for problem in problems if problem.field not in names]


def range_of(hint: Any) -> tuple[type, Range] | None:
    """Kind and range of the numbers in a type: ``Count``, ``Count | None``, ``tuple[Count, ...]``;
    None for a type without numbers that have a range.
    """
    if get_origin(hint) is Annotated:
        kind, *stated = get_args(hint)
        for item in stated:
            if isinstance(item, Range):
                return kind, item
    for inner in get_args(hint):
        found = range_of(inner)
        if found is not None:
            return found
    return None


def _typed_fields(config: Any) -> Iterator[tuple[Field[Any], Any, Any]]:
    """The fields of a dataclass with their values and types."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        yield field, getattr(config, field.name), hints[field.name]


def _problem(field: Field[Any], value: Any, hint: Any, prefix: str = "") -> Problem | None:
    """What is wrong with the number or the numbers of a field; None where nothing is."""
    found = range_of(hint)
    if found is None or value is None:
        return None
    kind, limits = found
    rule = _broken_rule(value, limits, whole=kind is int)
    if not rule:
        return None
    fix = _fix(field, value, limits, whole=kind is int)
    return Problem(
        field=prefix + field.name,
        value=value,
        rule=rule,
        fix=fix,
    )


def _broken_rule(value: Any, limits: Range, *, whole: bool) -> str:
    """The rule that the first number outside breaks; empty where there is none."""
    numbers = value if isinstance(value, tuple) else (value,)
    if not numbers:
        return "is empty"
    outside = [number for number in numbers if not limits.holds(number)]
    if not outside:
        return ""
    rule = limits.broken_by(outside[0], whole=whole)
    if whole and isinstance(value, tuple):
        return f"has {outside[0]}, which {rule}"
    return rule


def _fix(field: Field[Any], value: Any, limits: Range, *, whole: bool) -> str:
    if value == ():
        return "give it at least one"
    if limits.fix:
        return limits.fix
    if whole and limits.ge is not None and limits.le is not None:
        return f"use {limits.ge} to {limits.le}"
    if whole:
        return f"use {limits}"
    if field.default in (MISSING, None):
        return f"use one {limits}"
    return f"the default is {field.default}"
