"""The table of layers: complete, readable without torch, and never silent about a letter that it
does not have.
"""

import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

from parallel.mesh import single_mesh
from tests.helpers.tiny import tiny_config
from training.checkpoint.format.identity import model_problems as differences
from training.model.config import ModelConfig
from training.model.layer import Layer
from training.model.layer_kind import LayerKind
from training.model.layer_table import LAYERS, layer_state
from training.model.rules import model_problems
from training.plan.flops import flops_per_token
from training.plan.parameters import count_parameters

UNKNOWN = ModelConfig(pattern="MZ")

USES = {
    "parameters": lambda: count_parameters(UNKNOWN),
    "FLOPs": lambda: flops_per_token(UNKNOWN, 128),
    "state": lambda: layer_state(UNKNOWN, 1, 1),
    "module": lambda: Layer(1, UNKNOWN, single_mesh(), torch.float32),
}


@pytest.mark.parametrize("use", USES)
def test_an_unknown_letter_is_an_error(use):
    """Not 0, which nobody would see."""
    with pytest.raises(KeyError, match="Z"):
        USES[use]()


def test_an_unknown_letter_is_a_problem_of_the_pattern():
    (problem,) = model_problems(UNKNOWN, 1, 1)
    assert problem.field == "model.pattern"
    assert "'Z'" in problem.rule


@pytest.mark.parametrize("question", [field.name for field in fields(LayerKind)])
def test_a_kind_answers_every_question(question):
    answers = vars(LAYERS["M"]) | {}
    del answers[question]
    with pytest.raises(TypeError, match=question):
        LayerKind(**answers)


@pytest.mark.parametrize("letter", LAYERS)
def test_a_kind_is_what_its_letter_says(letter):
    kind = LAYERS[letter]
    model = tiny_config(pattern=letter, engram=None).model
    assert kind.letter == letter
    assert kind.config in vars(model)
    mixer = kind.build(model, single_mesh())
    assert isinstance(mixer, nn.Module)
    counted = kind.parameters(model)
    total = counted.mixer + counted.mlp + counted.router + counted.experts
    assert total == sum(parameter.numel() for parameter in mixer.parameters())


def test_what_no_layer_reads_does_not_make_another_model(tmp_path):
    """Of two models whose patterns have no dense layer, the width of such a layer says nothing."""
    model = tiny_config(pattern="ME", mlp_dim=64).model
    manifest = {"model": {"pattern": "ME", "mlp_dim": 32, "moe": {"top_k": 1}}}
    told = [problem.field for problem in differences(tmp_path, manifest, model)]
    assert told == ["model.moe.top_k"]


def test_no_torch():
    """The command line and the plan read the table."""
    code = (
        "import sys; import training.model.rules, training.plan.flops; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
