"""What a run's configuration may not be: every rule is told by its field, and all at once."""

from dataclasses import fields, is_dataclass, replace

import pytest

from parallel.mesh_plan import ParallelConfig
from training.config import OptimizerConfig, RunConfig, TrainConfig, validate
from training.model.config import (
    AttentionConfig,
    EngramConfig,
    Mamba1Config,
    ModelConfig,
    S4DConfig,
)
from training.model.rules import model_problems

WITH_ENGRAM = ModelConfig(engram=EngramConfig())


def told(problems):
    return [problem.field for problem in problems]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"save_every": 0}, "train.save_every=0 is below 1"),
        ({"keep": 0}, "train.keep=0 is below 1"),
        ({"keep_every": -1}, "train.keep_every=-1 is below 0"),
        ({"checkpoint_timeout_s": 0}, "train.checkpoint_timeout_s=0 is below 1"),
        ({"steps": 0}, "train.steps=0 is below 1"),
        ({"log_every": 0}, "train.log_every=0 is below 1"),
        ({"seed": -1}, "train.seed=-1 is below 0"),
    ],
)
def test_settings_that_cannot_be(fields, problem):
    (found,) = validate(RunConfig(train=TrainConfig(**fields), parallel=ParallelConfig()), 1)
    assert problem in str(found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("betas", (2.0, 2.0)),
        ("eps", 0.0),
        ("clip_norm", -1.0),
        ("weight_decay", float("inf")),
        ("warmup_steps", -1),
        ("min_ratio", 1.5),
        ("decay_fraction", -0.1),
    ],
)
def test_optimizers_that_cannot_be(name, value):
    (found,) = validate(RunConfig(optimizer=OptimizerConfig(**{name: value})), 1)
    assert str(found).startswith(f"optimizer.{name}={value} ")
    assert "must be" in found.rule or found.rule == "is below 0"


def numbers(block, prefix=""):
    """(name, value) of the numbers in nested dataclasses."""
    for field in fields(block):
        value = getattr(block, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif type(value) in (int, float):
            yield prefix + field.name, value


def changed(block, name, value):
    first, _, rest = name.partition(".")
    return replace(block, **{first: changed(getattr(block, first), rest, value) if rest else value})


@pytest.mark.parametrize("name", [name for name, _ in numbers(WITH_ENGRAM)])
def test_no_number_of_a_model_is_negative(name):
    assert told(model_problems(changed(WITH_ENGRAM, name, -1), 1, 1)) == [f"model.{name}"]


@pytest.mark.parametrize(
    "name", [name for name, value in numbers(WITH_ENGRAM) if type(value) is int]
)
def test_no_count_or_width_is_zero(name):
    problems = told(model_problems(changed(WITH_ENGRAM, name, 0), 1, 1))
    meant = (
        "mamba1.dt_rank",
        "moe.shared_dim",
        "engram.seed",
    )  # the default rank, no shared expert, a seed
    assert problems == ([] if name in meant else [f"model.{name}"])


@pytest.mark.parametrize(
    "name", [name for name, value in numbers(WITH_ENGRAM) if type(value) is float]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_of_a_model_are_finite(name, value):
    assert told(model_problems(changed(WITH_ENGRAM, name, value), 1, 1)) == [f"model.{name}"]


def test_a_wrong_layout_hides_no_other_problem():
    run = RunConfig(
        parallel=ParallelConfig(tp=3),
        model=ModelConfig(pattern="MQ"),
        train=TrainConfig(micro_batch=0, steps=0),
    )
    assert told(validate(run, 2)) == [
        "parallel.tp",
        "model.pattern",
        "train.steps",
        "train.micro_batch",
    ]


@pytest.mark.parametrize("field", ["micro_batch", "global_batch"])
def test_batches_have_rows(field):
    assert f"train.{field}" in told(validate(RunConfig(train=TrainConfig(**{field: 0})), 1))


@pytest.mark.parametrize(
    ("field", "model", "tp"),
    [
        ("model.s4d.state_dim", ModelConfig(pattern="L", s4d=S4DConfig(state_dim=7)), 1),
        (
            "model.attention.head_dim",
            ModelConfig(pattern="*", attention=AttentionConfig(head_dim=7, positions="rope")),
            1,
        ),
        ("model.d_model", ModelConfig(pattern="L", d_model=6, s4d=S4DConfig(expand=1)), 4),
        ("model.d_model", ModelConfig(pattern="S", d_model=6, mamba1=Mamba1Config(expand=1)), 4),
    ],
)
def test_widths_that_a_mixer_cannot_have_are_problems(field, model, tp):
    assert [problem.field for problem in model_problems(model, tp, 1)] == [field]


def test_odd_widths_that_a_mixer_can_have_are_none():
    mixers = {"s4d": S4DConfig(state_dim=7, init="real"), "attention": AttentionConfig(head_dim=7)}
    assert model_problems(ModelConfig(pattern="L*", **mixers), 1, 1) == []
