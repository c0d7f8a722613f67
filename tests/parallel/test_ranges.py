"""Ranges of a configuration's numbers: what lies in one, what is told of what does not, and that
rules about such numbers are silent.
"""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated

import pytest

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


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part of a configuration."""

    width: Count = 4
    rates: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    places: tuple[Natural, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A configuration."""

    inner: Inner = field(default_factory=Inner)
    part: Inner | None = None
    steps: Count | None = None
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
