"""Export: transformers' own classes give our logits, and what comes back is what went out, bit by
bit.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.errors import RunError
from parallel.table_config import TableConfig
from tests.helpers.compare import assert_close
from tests.helpers.saved import loaded_logits, make_consistent, read_plainly, save_run
from tests.helpers.tiny import VOCAB, tiny_config
from tests.training.checkpoint.exchange.models import FITTING, SOFTMAX, config_of, their_logits
from training.checkpoint.exchange.exporting import export
from training.checkpoint.exchange.importing import import_model
from training.checkpoint.format.logical import is_weight
from training.checkpoint.tools.average import average
from training.checkpoint.tools.reader import Reader


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
