"""run.json: round trip, strictness, and where a run took place."""

import json
from dataclasses import replace

import pytest

from parallel.errors import RunError
from training.presets import PRESETS
from training.run_file import load_run_json, save_run_json


@pytest.fixture
def saved(tmp_path):
    save_run_json(tmp_path / "run.json", PRESETS["tiny"](), world_size=2)
    return tmp_path / "run.json"


def change(path, **values):
    """Set dotted keys (``__`` for the dot) of the saved file."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name, tmp_path):
    config = replace(PRESETS[name](), name="x")
    save_run_json(tmp_path / "run.json", config, world_size=2)
    assert load_run_json(tmp_path / "run.json") == config
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_says_where_it_ran(saved):
    content = json.loads(saved.read_text())
    assert set(content) == {"config", "commit", "versions", "hardware"}
    assert content["hardware"]["processes"] == 2
    assert content["versions"]["torch"]


def test_unknown_keys_name_the_nearest(saved):
    change(
        saved,
        config__train__stepz=3,
        config__model__engram__layer=1,
        hardwear={},
    )
    with pytest.raises(RunError) as error:
        load_run_json(saved)
    fixes = {problem.field: problem.fix for problem in error.value.problems}
    assert fixes == {
        "train.stepz": "did you mean train.steps?",
        "model.engram.layer": "did you mean model.engram.layers?",
        "hardwear": "did you mean hardware?",
    }


def test_wrong_types_name_field_and_value(saved):
    change(saved, config__train__steps="3", config__train__dtype="fp64")
    with pytest.raises(RunError) as error:
        load_run_json(saved)
    assert {(problem.field, problem.value) for problem in error.value.problems} == {
        ("train.steps", "3"),
        ("train.dtype", "fp64"),
    }


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_what_is_not_a_run_file(content, tmp_path):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match=r"--config=.*run\.json"):
        load_run_json(path)
