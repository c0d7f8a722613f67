"""Ranges of a configuration's numbers: what lies in one, what is told of what does not, and that
rules about such numbers are silent.
"""

import math
import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

import launch.analyze
import launch.checkpoint
import launch.generate
import launch.plan
from parallel.ranges import (
    LARGEST,
    UNKNOWN,
    Count,
    DecayRate,
    Natural,
    Positive,
    Range,
    Share,
    known,
    range_of,
    range_problems,
)
from training.config import RunConfig, validate
from training.data.config import PrepareConfig, prepare_problems
from training.model.config import EngramConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part of the configuration that these tests check."""

    width: Count = 4
    rates: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    places: tuple[Natural, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The configuration that these tests check."""

    inner: Inner = field(default_factory=Inner)
    part: Inner | None = None
    steps: Count | None = None
    stage: Annotated[int, Range(ge=1, le=2)] = 1
    scale: Positive = 1.0
    text: str = ""
    switch: bool = False


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Range(ge=1), (1, 2, LARGEST), (0, -1, LARGEST + 1, 10**400)),
        (Range(ge=1, le=3), (1, 3), (0, 4)),
        (Range(gt=0), (1e-300, 1e300), (0.0, -1.0, math.inf, -math.inf, math.nan)),
        (Range(ge=0, lt=1), (0.0, 0.999), (1.0, -1e-9, math.nan, math.inf)),
        (Range(gt=0, le=1), (1e-9, 1.0), (0.0, 1.1)),
        (Range(), (-1.0, LARGEST, -LARGEST), (math.nan, math.inf, -math.inf, -LARGEST - 1)),
    ],
)
def test_borders(limits, inside, outside):
    assert [value for value in inside if not limits.holds(value)] == []
    assert [value for value in outside if limits.holds(value)] == []


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (Outer(steps=0), "steps=0 is below 1; use 1 or more"),
        (Outer(steps=2**63), f"steps={2**63} is above {LARGEST}; use 1 or more"),
        (Outer(stage=3), "stage=3 is above 2; use 1 to 2"),
        (Outer(scale=0.0), "scale=0.0 must be above 0, and finite; the default is 1.0"),
        (Outer(scale=math.nan), "scale=nan must be above 0, and finite; the default is 1.0"),
        (
            Outer(inner=Inner(rates=(0.5, 1.0))),
            "inner.rates=(0.5, 1.0) must be 0 or more and below 1; the default is (0.9, 0.95)",
        ),
        (
            Outer(part=Inner(places=(1, -2))),
            "part.places=(1, -2) has -2, which is below 0; use 0 or more",
        ),
        (Outer(part=Inner(places=())), "part.places=() is empty; give it at least one"),
    ],
)
def test_a_number_outside_is_told_with_field_value_rule_and_fix(config, told):
    assert list(map(str, range_problems(config))) == [told]


def test_all_numbers_outside_are_told_and_none_inside():
    assert range_problems(Outer(part=Inner())) == []
    wrong = Outer(inner=Inner(width=0, rates=(math.nan, 0.5)), part=Inner(width=-1), scale=-1.0)
    fields = [problem.field for problem in range_problems(wrong, "--")]
    assert fields == ["--inner.width", "--inner.rates", "--part.width", "--scale"]


def test_a_range_is_found_in_optional_and_repeated_numbers():
    share = Range(ge=0, le=1)
    for hint in (Share, Share | None, tuple[Share, ...], tuple[Share, Share] | None):
        assert range_of(hint) == (float, share)
    assert range_of(int) is None
    assert range_of(tuple[str, ...] | None) is None
    assert range_of(Annotated[int, "counted"]) is None


def test_no_rule_holds_of_a_number_that_is_not_known():
    wrong = known(Outer(inner=Inner(width=0, places=(-1,)), scale=math.nan))
    width = wrong.inner.width
    assert width is wrong.scale is wrong.inner.places is UNKNOWN
    assert wrong.inner.rates == Inner().rates
    broken = [
        7 % width,
        width % 7,
        (width * 3 + 1 - width) // 2 % 5,
        1.0 / width,
        width < 1,
        width >= 1,
        width == 0,
        width != 0,
        width in (1, 2),
        [place for place in wrong.inner.places if place > 3],
        len(set(wrong.inner.places)) < len(wrong.inner.places),
    ]
    assert not any(broken)


def test_ranges_need_no_torch():
    code = (
        "import sys, launch.train, training.config, parallel.ranges; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# All configurations that a user writes.

ENGRAM = ModelConfig(engram=EngramConfig())
CONFIGURATIONS = {
    "train": RunConfig(model=ENGRAM),
    "prepare": PrepareConfig(),
    "plan": launch.plan.Request(run="tiny"),
    "generate": launch.generate.Request(run=Path("runs/tiny"), prompt="x"),
    "analyze": launch.analyze.Request(source=Path("runs/tiny")),
    **{f"checkpoint {kind.__name__}": kind for kind in get_args(launch.checkpoint.Request)},
}


def without_range(hint):
    """The int and float of a type that stand in it without a range, those of its dataclasses, too.

    Independent of the check: what that does not find is found here.
    """
    if get_origin(hint) is Annotated:
        inner, *stated = get_args(hint)
        return [] if any(isinstance(item, Range) for item in stated) else without_range(inner)
    if is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        return [
            f"{hint.__name__}.{name}: {kind}"
            for name, inner in hints.items()
            for kind in without_range(inner)
        ]
    if hint in (int, float):
        return [hint.__name__]
    return [found for inner in get_args(hint) for found in without_range(inner)]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_number_that_a_user_writes_is_without_a_range(name):
    config = CONFIGURATIONS[name]
    kind = config if isinstance(config, type) or get_origin(config) else type(config)
    assert without_range(kind) == []


def test_a_number_without_a_range_is_seen():
    @dataclass
    class Loose:
        steps: int
        rates: tuple[float, ...]
        size: int | None
        inner: Inner
        switch: bool

    assert without_range(Loose) == ["Loose.steps: int", "Loose.rates: float", "Loose.size: int"]


def numbers(config, prefix=""):
    """(name, type, value) of the fields of numbers in nested dataclasses."""
    for item in fields(config):
        value = getattr(config, item.name)
        hint = get_type_hints(type(config), include_extras=True)[item.name]
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{item.name}.")
        elif range_of(hint) is not None:
            yield prefix + item.name, hint, value


def changed(config, name, value):
    first, _, rest = name.partition(".")
    inner = changed(getattr(config, first), rest, value) if rest else value
    return replace(config, **{first: inner})


def tried(hint, value):
    """(values of a field to try, whether each lies in its range): 0, -1, nan, inf, huge ones and
    the borders.
    """
    kind, limits = range_of(hint)
    is_many = isinstance(value, tuple)
    numbers = [0, -1, 2**63, LARGEST]
    if kind is float:
        numbers = [0.0, -1.0, math.nan, math.inf, -math.inf, 1e300]
    numbers += [border for border in (limits.ge, limits.le) if border is not None]
    numbers += [border for border in (limits.gt, limits.lt) if border is not None]
    for number in numbers:
        inside = (
            -math.inf < number < math.inf
            and (kind is float or abs(number) < 2**63)
            and (limits.ge is None or number >= limits.ge)
            and (limits.gt is None or number > limits.gt)
            and (limits.le is None or number <= limits.le)
            and (limits.lt is None or number < limits.lt)
        )
        yield ((*value[:-1], number) if is_many else number), inside


FIELDS = [
    pytest.param(name, field, hint, default, id=f"{name} {field}")
    for name in ("train", "prepare", "plan", "generate", "analyze")
    for field, hint, default in numbers(CONFIGURATIONS[name])
]
CHECKS = {"train": lambda config: validate(config, 1), "prepare": prepare_problems}


@pytest.mark.parametrize(("name", "field", "hint", "default"), FIELDS)
def test_exactly_the_field_at_fault_is_told(name, field, hint, default):
    for value, inside in tried(hint, default):
        config = changed(CONFIGURATIONS[name], field, value)
        told = [problem.field for problem in range_problems(config)]
        assert told == ([] if inside else [field]), value
        if not inside and name in CHECKS:
            assert [problem.field for problem in CHECKS[name](config)] == [field], value


def test_one_fault_a_field_is_told_of_all_fields_at_once():
    config = CONFIGURATIONS["train"]
    names = [name for name, *_ in numbers(config)]
    for name, hint, value in numbers(config):
        wrong = math.nan if range_of(hint)[0] is float else -1
        config = changed(config, name, (wrong,) * len(value) if isinstance(value, tuple) else wrong)
    assert sorted(problem.field for problem in validate(config, 1)) == sorted(names)
