"""The presets' sizes: what their docstrings say, and what the papers print."""

import re

import pytest

from training.config import validate
from training.plan.parameters import count_parameters
from training.presets import PRESETS

UNITS = {"M": 1e6, "B": 1e9}


@pytest.mark.parametrize("name", PRESETS)
def test_docstring_tells_the_counts(name):
    """Numbers in the first paragraph: without tables, active,
    and in tables where there are some.
    """
    count = count_parameters(PRESETS[name]().model)
    told = " ".join(PRESETS[name].__doc__.split("\n\n")[0].split())
    sizes = re.findall(r"([\d.]+)([MB]) (parameters|active|in tables)", told)
    expected = {
        "parameters": count.total - count.engram_table,
        "active": count.active,
        "in tables": count.engram_table,
    }
    assert {kind for _, _, kind in sizes} == {kind for kind, value in expected.items() if value}
    for number, unit, kind in sizes:
        shown = f"{expected[kind] / UNITS[unit]:.{len(number.partition('.')[2])}f}"
        assert shown == number, f"{name}: {kind} is {expected[kind]:,}"


@pytest.mark.parametrize(
    ("name", "attribute", "published", "tolerance"),
    [
        # arXiv 2601.07372, section 6.2: a 3B model, 0.56B active, with 1.6B of Engram.
        ("moe-3b", "total", 3.0e9, 0.03),
        ("moe-3b", "active", 0.56e9, 0.01),
        ("moe-3b-engram-1.6b", "engram_table", 1.6e9, 0.01),
        ("moe-3b-engram-1.6b", "active", 0.56e9, 0.04),
        # Table 1: Engram-27B has 26.7B, 3.8B active, 5.7B in tables.
        ("hybrid-27b", "total", 26.7e9, 0.02),
        ("hybrid-27b", "active", 3.8e9, 0.02),
        ("hybrid-27b", "engram_table", 5.7e9, 0.02),
    ],
)
def test_published_sizes(name, attribute, published, tolerance):
    assert getattr(count_parameters(PRESETS[name]().model), attribute) == pytest.approx(
        published, rel=tolerance
    )


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
@pytest.mark.parametrize("name", ["moe-3b", "moe-3b-engram-1.6b", "hybrid-27b"])
def test_runs_at_any_power_of_two(name, world_size):
    assert validate(PRESETS[name](), world_size) == []


@pytest.mark.parametrize("name", PRESETS)
def test_one_or_two_processes(name):
    assert PRESETS[name]().name == name
    assert validate(PRESETS[name](), 1) == validate(PRESETS[name](), 2) == []


def test_nemotrons_regularities():
    """First layer Mamba, last no attention, attention before experts: 11 % of the layers (as in
    Nemotron 3 Nano).
    """
    pattern = PRESETS["hybrid-27b"]().model.pattern
    assert (pattern.count("M"), pattern.count("E"), pattern.count("*")) == (24, 24, 6)
    assert pattern[0] == "M"
    assert all(
        pattern[place - 1 : place + 2] == "M*E"
        for place, letter in enumerate(pattern)
        if letter == "*"
    )
