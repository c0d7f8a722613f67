"""Export and import: transformers' own classes give our logits, and what comes back is what went
out, bit by bit.
"""

import importlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from parallel.errors import RunError
from parallel.table_config import TableConfig
from tests.helpers.compare import assert_close
from tests.helpers.saved import loaded_logits, make_consistent, read_plainly, sample_ids, save_run
from tests.helpers.tiny import VOCAB, layout, tiny_config
from training.checkpoint.exchange.exporting import choose_family, export
from training.checkpoint.exchange.importing import import_model
from training.checkpoint.exchange.tensor_file import write_tensor_file
from training.checkpoint.format.logical import is_weight
from training.checkpoint.tools.average import average
from training.checkpoint.tools.reader import Reader
from training.config import RunConfig
from training.model.config import AttentionConfig, Mamba2Config, MoEConfig
from training.run_file import load_run_json

SOFTMAX = MoEConfig(
    num_experts=4, top_k=2, expert_dim=24, shared_dim=16, scores="softmax", bias_rate=0.0
)
ROPE = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    positions="rope",
    rope_theta=500.0,
)
GROUPS = Mamba2Config(
    head_dim=8,
    state_dim=12,
    num_groups=4,
    chunk_size=8,
)
# Class of transformers by model; all are trained on two tensor ranks.
FITTING = {
    "mamba2": ("Mamba2ForCausalLM", {"pattern": "MMM", "mamba2": GROUPS}),
    "mamba2 tied": (
        "Mamba2ForCausalLM",
        {"pattern": "MM", "tie_embeddings": True, "norm_eps": 1e-3},
    ),
    "mamba1": ("MambaForCausalLM", {"pattern": "SS"}),
    "hybrid": ("NemotronHForCausalLM", {"pattern": "M*M", "mamba2": GROUPS}),
    "hybrid rope": ("GraniteMoeHybridForCausalLM", {"pattern": "M*M", "attention": ROPE}),
    "hybrid mlp": (
        "GraniteMoeHybridForCausalLM",
        {"pattern": "M-*-M", "attention": ROPE, "tie_embeddings": True},
    ),
    "experts": (
        "GraniteMoeHybridForCausalLM",
        {"pattern": "MEM*EM", "moe": SOFTMAX, "mamba2": GROUPS},
    ),
    "experts alone": (
        "GraniteMoeHybridForCausalLM",
        {"pattern": "*EME", "moe": replace(SOFTMAX, shared_dim=0, top_k=1)},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _imports_before_forks():
    """What every rank would otherwise import again."""
    for name in ("megatron.core.parallel_state", "megatron.core.tensor_parallel"):
        importlib.import_module(name)


@pytest.fixture(scope="module")
def transformers():
    """The library, whose classes are the oracle; it warns of everything that is not installed."""
    logging.disable(logging.WARNING)
    yield importlib.import_module("transformers")
    logging.disable(logging.NOTSET)


def config_of(**model) -> RunConfig:
    config = tiny_config(**({"engram": None} | model))
    return replace(config, parallel=layout(tp=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained checkpoint and its configuration, by model."""
    made = {}

    def of(**model) -> tuple[Path, RunConfig]:
        config = config_of(**model)
        if config not in made:
            made[config] = save_run(config, tmp_path_factory.mktemp("runs") / "run", 2)[0]
        return made[config], config

    return of


def their_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(sample_ids()).logits


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: values for name, values in read_plainly(path).items() if is_weight(name)}


def assert_same_weights(one: Path, other: Path) -> None:
    mine = weights(one)
    theirs = read_plainly(other)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert values.dtype == theirs[name].dtype
        assert torch.equal(values.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("case", FITTING)
def test_transformers_computes_our_logits_and_import_brings_our_bits_back(
    case, saved, transformers, tmp_path
):
    architecture, fields = FITTING[case]
    path, config = saved(**fields)
    exported = export(path, tmp_path / "out")
    assert exported.architecture == architecture
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == architecture
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = loaded_logits(path, config)
    assert_close(
        "logits",
        their_logits(theirs),
        expected,
        1e-5,
    )
    made = import_model(tmp_path / "out", tmp_path / "back")
    assert made.model == config.model
    assert_same_weights(path, made.path)
    assert torch.equal(loaded_logits(made.path, config), expected)


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


def test_router_biases_that_matter_keep_a_model_out(saved, tmp_path):
    """Softmax scores, but a bias that moved: only our own format holds it."""
    fields = {"pattern": "ME", "moe": replace(SOFTMAX, bias_rate=1e-2)}
    path, config = saved(**fields)
    assert read_plainly(path)["buffer/layers.1.mixer.bias"].any()
    exported = export(path, tmp_path / "out")
    assert exported.architecture is None
    assert "selection bias" in exported.misfits["GraniteMoeHybridForCausalLM"][-1]
    made = import_model(tmp_path / "out", tmp_path / "back")
    assert_same_weights(path, made.path)
    assert torch.equal(loaded_logits(made.path, config), loaded_logits(path, config))


def test_any_model_goes_out_and_in(saved, tmp_path):
    path, config = saved(engram=tiny_config().model.engram, num_streams=2)
    exported = export(path, tmp_path / "out")
    assert (exported.architecture, exported.num_zeros) == (None, 0)
    assert len(exported.misfits) == 4
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = weights(path)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], values) for name, values in expected.items())
    made = import_model(tmp_path / "out", tmp_path / "back")
    assert made.has_run
    assert_same_weights(path, made.path)
    assert Reader(made.path).manifest["hashes"] == Reader(path).manifest["hashes"] != None  # noqa: E711
    assert torch.equal(loaded_logits(made.path, config), loaded_logits(path, config))


@pytest.mark.parametrize("rows", ["bf16", "fp8"])
def test_tables_keep_their_format(rows, tmp_path):
    config = config_of(
        pattern="MM", engram=replace(tiny_config().model.engram, layers=(1,), head_dim=32)
    )
    config = replace(config, table=TableConfig(rows=rows))
    path = save_run(config, tmp_path / "run", 2)[0]
    export(path, tmp_path / "out")
    made = import_model(tmp_path / "out", tmp_path / "back")
    assert (
        weights(path)["engram.1.weight"].dtype == {"bf16": torch.bfloat16, "fp8": torch.uint8}[rows]
    )
    assert_same_weights(path, made.path)
    assert torch.equal(loaded_logits(made.path, config), loaded_logits(path, config))
    if rows == "fp8":
        with pytest.raises(RunError, match="rows in fp8"):
            average([path, path], tmp_path / "mean")
    else:
        assert_same_weights(path, average([path, path], tmp_path / "mean"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pattern": "ML"}, "it has no layers L as ours"),
        ({"pattern": "MM", "num_streams": 4}, "one residual stream, not 4"),
        ({"pattern": "MM", "engram": tiny_config().model.engram}, "no Engram memory"),
        ({"pattern": "MEE", "moe": SOFTMAX}, "each follow a mixer"),
        ({"pattern": "EM", "moe": SOFTMAX}, "each follow a mixer"),
        ({"pattern": "MEM-", "moe": SOFTMAX}, "all experts or all none"),
        (
            {"pattern": "ME", "moe": replace(SOFTMAX, scores="sigmoid")},
            "weighed by a softmax, ours by moe.scores=sigmoid",
        ),
        (
            {"pattern": "ME", "moe": replace(SOFTMAX, route_scale=2.5)},
            "sum to 1, ours to moe.route_scale=2.5",
        ),
        ({"pattern": "ME", "moe": replace(SOFTMAX, capacity_factor=1.0)}, "drop no tokens"),
    ],
)
def test_why_no_class_fits(fields, reason):
    family, misfits = choose_family(config_of(**fields).model, biased=False)
    assert family is None
    assert any(reason in told for told in misfits["GraniteMoeHybridForCausalLM"])


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


def test_damage_is_not_exported(saved, tmp_path):
    import shutil

    path, _ = saved(**FITTING["mamba2"][1])
    copy = Path(shutil.copytree(path, tmp_path / path.name))
    chunk = Reader(copy).tensors["fp32/norm"].chunks[0]
    with open(copy / chunk.file, "r+b") as file:
        file.seek(chunk.offset + chunk.length // 2)
        file.write(b"\xff")
    with pytest.raises(RunError, match="differs from its checksum"):
        export(copy, tmp_path / "out")
    with pytest.raises(RunError, match=r"output=.* exists"):
        export(path, copy)
    (tmp_path / "file").write_text("")
    make_consistent(copy)
    with pytest.raises(RunError, match="cannot be written"):
        export(path, tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


def test_padding_of_the_vocabulary_stays_ours(saved, tmp_path):
    path, _ = saved(**FITTING["mamba2"][1])
    export(path, tmp_path / "out")
    beside = load_file(tmp_path / "out" / "engramba.safetensors")
    whole = read_plainly(path)
    assert torch.equal(beside["beside.padding.head.weight"], whole["fp32/head.weight"][VOCAB:])
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (VOCAB, 32)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 5), min_size=1, max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32]),
        ),
        max_size=4,
    ),
    st.integers(1, 3),
)
def test_the_library_reads_what_is_written_in_blocks(tmp_path_factory, kinds, step):
    tensors = {name: (torch.randn(shape) * 100).to(dtype) for name, (shape, dtype) in kinds.items()}
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    shapes = {name: (tuple(values.shape), values.dtype) for name, values in tensors.items()}
    write_tensor_file(
        path, shapes, ((name, values.split(step)) for name, values in tensors.items())
    )
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(
        torch.equal(read[name], values) and read[name].dtype == values.dtype
        for name, values in tensors.items()
    )
