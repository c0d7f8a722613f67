"""Import: models that transformers saved give its logits here, and what is none of ours is
refused.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.errors import RunError
from tests.helpers.compare import assert_close
from tests.helpers.saved import loaded_logits
from tests.training.checkpoint.exchange.models import FITTING, their_logits
from training.checkpoint.exchange.exporting import export
from training.checkpoint.exchange.importing import import_model
from training.run_file import load_run_json


@pytest.mark.parametrize("case", ["mamba2", "mamba1", "hybrid", "hybrid mlp", "experts"])
def test_what_transformers_saved_gives_its_logits_here(case, saved, transformers, tmp_path):
    """Without our own file: the model is known by its config.json alone; weights in bf16, cut into
    several files.
    """
    path, _ = saved(**FITTING[case][1])
    export(path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    made = import_model(tmp_path / "saved", tmp_path / "run")
    assert (made.has_run, made.architecture) == (False, FITTING[case][0])
    config = load_run_json(tmp_path / "run" / "run.json")
    assert config.model == made.model
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32
    )
    assert_close(
        "logits",
        loaded_logits(made.path, config),
        their_logits(again),
        1e-5,
    )


def test_zeros_that_were_trained_are_no_longer_ours(saved, transformers, tmp_path):
    path, _ = saved(**FITTING["experts"][1])
    assert export(path, tmp_path / "out").num_zeros > 0
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.output_linear.weight"][2, 0, 0] = (
        1e-3  # "M" at 2 has none after it
    )
    before = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert before == ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        RunError,
        match=r"layers\.1\.block_sparse_moe\.output_linear.* is not 0 all over; delete engramba",
    ):
        import_model(tmp_path / "out", tmp_path / "back")
    (tmp_path / "out" / "engramba.json").unlink()
    made = import_model(tmp_path / "out", tmp_path / "back")
    assert made.model.pattern == "MEME*EME"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    config = load_run_json(tmp_path / "back" / "run.json")
    assert_close(
        "logits",
        loaded_logits(made.path, config),
        their_logits(theirs),
        1e-5,
    )


@pytest.fixture
def out(saved, tmp_path):
    """An exported Mamba-2 without our own file."""
    export(saved(**FITTING["mamba2"][1])[0], tmp_path / "out")
    (tmp_path / "out" / "engramba.json").unlink()
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_type": "llama"},
            "is of model_type llama; import one of mamba2, mamba, nemotron_h, granitemoehybrid",
        ),
        ({"use_bias": True}, "use_bias is True, here False"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, here silu"),
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit is \[0.0, 0.1\], here none"),
        ({"state_size": 13}, r"in_proj.weight is \[232, 32\], expected \[240, 32\]"),
        ({"num_hidden_layers": 4}, "backbone.layers.3.norm.weight is missing"),
        ({"num_hidden_layers": 2}, "backbone.layers.2.mixer.A_log has no place"),
        ({"head_dim": 7}, "model.mamba2.head_dim=7 does not divide"),
        ({"vocab_size": "many"}, "is no model"),
    ],
)
def test_other_models_are_refused(out, tmp_path, changes, reason):
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(RunError, match=reason):
        import_model(out, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_multiplier_is_no_function_of_ours(saved, tmp_path):
    export(saved(**FITTING["experts"][1])[0], tmp_path / "out")
    (tmp_path / "out" / "engramba.json").unlink()
    file = tmp_path / "out" / "config.json"
    whole = json.loads(file.read_text())
    for key, value in {
        "residual_multiplier": 0.22,
        "logits_scaling": 8,
        "attention_multiplier": 1.0,
    }.items():
        file.write_text(json.dumps(whole | {key: value}))
        with pytest.raises(RunError, match=f"{key} is {value}, here"):
            import_model(tmp_path / "out", tmp_path / "run")
    file.write_text(
        json.dumps({key: value for key, value in whole.items() if key != "attention_multiplier"})
    )
    with pytest.raises(RunError, match=r"attention_multiplier is 1\.0"):
        import_model(tmp_path / "out", tmp_path / "run")


def test_what_is_no_export(out, tmp_path):
    for name, reason in (
        ("config.json", "has no config.json to read"),
        ("model.safetensors", "cannot be read"),
    ):
        moved = (out / name).rename(out / "away")
        with pytest.raises(RunError, match=reason):
            import_model(out, tmp_path / "run")
        moved.rename(out / name)
    (out / "engramba.json").write_text('{"format": 2}')
    with pytest.raises(RunError, match="format 2, newer than 1"):
        import_model(out, tmp_path / "run")
    (out / "engramba.json").unlink()
    with pytest.raises(RunError, match=r"output=.* exists"):
        import_model(out, out)
