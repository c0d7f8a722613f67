"""The learning rate over a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import OptimizerConfig
from training.schedule import learning_rate


def rates(num_steps: int, **fields) -> list[float]:
    """The rates of all steps, and of one beyond."""
    config = OptimizerConfig(**({"learning_rate": 2.0} | fields))
    return [learning_rate(config, step, num_steps) for step in range(num_steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_is_linear_and_the_first_step_learns(schedule):
    got = rates(40, schedule=schedule, warmup_steps=10)
    assert got[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    assert got[10] == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_without_warm_up_the_first_step_is_the_peak(schedule):
    assert rates(10, schedule=schedule, warmup_steps=0)[0] == pytest.approx(2.0)


def test_cosine():
    got = rates(
        110,
        schedule="cosine",
        warmup_steps=10,
        min_ratio=0.1,
    )
    assert got[-1] == pytest.approx(0.2)
    assert got[60] == pytest.approx(0.2 + 0.5 * 1.8)
    assert got[35] == pytest.approx(0.2 + 1.8 * (0.5 + 0.25 * 2**0.5))


def test_wsd_is_flat_then_falls_as_one_minus_root():
    got = rates(
        100,
        schedule="wsd",
        warmup_steps=10,
        min_ratio=0.1,
        decay_fraction=0.2,
    )
    assert got[10:81] == pytest.approx([2.0] * 71)
    assert got[85] == pytest.approx(0.2 + 1.8 * 0.5)  # a quarter of the way: 1 - sqrt(1/4)
    assert got[-1] == pytest.approx(0.2)


def test_beyond_the_end_stays_at_the_end():
    for schedule in ("cosine", "wsd"):
        config = OptimizerConfig(
            learning_rate=2.0, schedule=schedule, warmup_steps=1, min_ratio=0.25
        )
        assert learning_rate(config, 500, 100) == pytest.approx(0.5)


@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    num_steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    min_ratio=st.floats(0, 1),
    fraction=st.floats(0, 1),
)
def test_rises_in_warm_up_and_falls_after_it(schedule, num_steps, warmup, min_ratio, fraction):
    """Whatever the settings: never 0 in the run, never above the peak, and no second rise."""
    got = rates(
        num_steps,
        schedule=schedule,
        warmup_steps=warmup,
        min_ratio=min_ratio,
        decay_fraction=fraction,
    )
    rising = got[:warmup]
    falling = got[warmup:]
    assert all(0 < rate <= 2.0 * (1 + 1e-12) for rate in got[:num_steps])
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert min(falling, default=2.0) >= 2.0 * min_ratio * (1 - 1e-12)
