"""N ranks equal one rank (fp32, clipping active in every step): figures, gradients, parameters and
table rows.
"""

import pytest

from tests.parity import (
    CASES,
    MODELS,
    TOLERANCE,
    assert_smooth,
    beyond_rounding,
    differences,
    reference_run,
    run_case,
    true_run,
)

# What the contract names; a rename must not drop one from the comparison.
NAMED = (
    "experts.gate_up",
    "experts.down",
    "router",
    "A_log",
    "dt_bias",
    ".norm",
    "norm_weight",
    "query_norm",
    "key_norm",
    "conv_norm",
    "embedding.weight",
    "engram.3.weight",
)


@pytest.fixture(scope="module")
def references():
    """The single process, once a model."""
    return {model: reference_run(model) for model in MODELS}


@pytest.fixture(scope="module")
def truths():
    """The same run in fp64, once a model."""
    return {model: true_run(config()) for model, config in MODELS.items()}


@pytest.mark.parametrize("model", MODELS)
def test_one_rank_differs_from_fp64_by_rounding(references, truths, model):
    assert not beyond_rounding(references[model], truths[model])


@pytest.mark.parametrize("model", MODELS)
def test_reference_clips_in_every_step_and_is_smooth(references, model):
    run = references[model]
    clip = MODELS[model]().optimizer.clip_norm
    assert all(clip / norm < 0.1 for _, norm in run["figures"])
    assert_smooth(run)
    untouched = [name for name, update in run["updates"].items() if not update.any()]
    assert not untouched, f"these never move, so comparing them proves nothing: {untouched}"
    changed = [
        name for name, rows in run["rows"].items() if (rows != run["initial rows"][name]).any()
    ]
    assert changed == sorted(run["rows"])


def test_every_named_gradient_is_compared_and_not_zero(references):
    found = references["plain"][
        "last gradients"
    ]  # in the first step the convolution is zero, and conv_norm's too
    for name in NAMED:
        matching = [values for key, values in found.items() if key.endswith(name)]
        assert matching, name
        assert all(values.any() for values in matching), name


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case.slow else ()) for case in CASES],
    ids=lambda case: f"{case.world_size} ranks: {case.name}",
)
def test_layout_equals_one_rank(references, truths, case):
    got = run_case(case.config(), case.world_size)
    beyond = beyond_rounding(got, truths[case.model])
    wrong = [
        f"{kind} {name}: {value:.1e}"
        for kind, by_name in differences(got, references[case.model]).items()
        for name, value in by_name.items()
        if not value <= TOLERANCE[kind] and (kind, name) in beyond
    ]
    assert not wrong, "relative differences: " + ", ".join(wrong)
