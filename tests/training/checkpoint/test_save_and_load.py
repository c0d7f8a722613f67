"""Checkpoints of runs: the same bits on the same layout, the same values on any other, damage and
strangers refused.

What is saved is trained once for all tests of this file: those of ``identity.py`` and
``storage.py`` that read such a checkpoint stand here, too.
"""

import shutil
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from parallel.errors import RunError
from parallel.mesh import single_mesh
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.helpers.saved import assert_same_tensors, config_of, go_on, read_plainly, rewrite
from tests.helpers.tiny import (
    layout,
    made_up_rows,
    made_up_token_map,
    make_trainer,
    tiny_config,
    train_steps,
)
from training.checkpoint import latest, load, load_initial, load_weights, save
from training.checkpoint.format import storage
from training.checkpoint.format.logical import is_weight
from training.config import RunConfig
from training.data.token_map import TokenMap
from training.engram.memory import EngramMemory, build_memory, memory_of
from training.model.model import HybridModel, build_model
from training.trainer import DTYPES

SAVED_AT = 3
# What is saved: number of ranks and configuration.
CASES = {
    "1": (1, config_of({})),
    "1 no gate": (1, config_of({}, engram=replace(tiny_config().model.engram, gate=False))),
    "1 bf16": (1, config_of({}, "bf16")),
    "TP2": (2, config_of({"tp": 2})),
    "TP2 bf16": (2, config_of({"tp": 2}, "bf16")),
    "TP2 EP4 ZeRO2": (
        4,
        config_of({"tp": 2, "ep": 4, "zero_stage": 2}, tie_embeddings=True, num_streams=2),
    ),
}


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    ids_BL, _, documents_BL = made_up_rows(77)
    return ids_BL[:2], documents_BL[:2]


def logits_of(model: HybridModel, memory: EngramMemory | None) -> torch.Tensor:
    ids_BL, documents_BL = tokens()
    rows = {} if memory is None else memory_of(memory.look_up(ids_BL, documents_BL))
    return model.logits(ids_BL, documents_BL, rows)


def run_and_save(config: RunConfig, directory: Path, more: int):
    """Train, save, go on: later figures, logits at the save, and parameters of this rank."""
    trainer, _ = train_steps(config, SAVED_AT)
    path = save(
        directory,
        trainer,
        SAVED_AT,
        {"fingerprint": "abc", "nested": [1, None]},
    )
    logits = logits_of(trainer.model, trainer.memory).numpy()
    parameters = {
        name: p.detach().float().numpy().copy() for name, p in trainer.model.named_parameters()
    }
    return path, go_on(trainer, SAVED_AT, more), logits, parameters


def load_and_go_on(config: RunConfig, directory: Path, more: int, again: Path):
    """Load into a new trainer, save what was loaded, go on."""
    trainer = make_trainer(config)
    manifest = load(latest(directory), trainer)
    save(again, trainer, manifest["step"], manifest["extra"])
    return manifest["step"], manifest["extra"], go_on(trainer, manifest["step"], more)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """The results of ``run_and_save`` by ranks, layout and dtype; each runs once."""

    @lru_cache
    def results(case: str) -> list:
        world_size, config = CASES[case]
        return run_ranks(
            run_and_save,
            world_size,
            config,
            tmp_path_factory.mktemp(case),
            5,
        )

    return results


@pytest.mark.parametrize("case", ["1", "1 bf16", "TP2 bf16", "TP2 EP4 ZeRO2"])
def test_same_layout_goes_on_with_the_same_bits(case, saved_run, tmp_path):
    world_size, config = CASES[case]
    first = saved_run(case)
    path = first[0][0]
    second = run_ranks(
        load_and_go_on,
        world_size,
        config,
        path.parent,
        5,
        tmp_path,
    )
    assert path.name == "step-00000003"
    for (_, figures, *_), (step, extra, resumed) in zip(first, second, strict=True):
        assert (step, extra) == (SAVED_AT, {"fingerprint": "abc", "nested": [1, None]})
        assert resumed == figures
    assert_same_tensors(path, latest(tmp_path))


@pytest.mark.parametrize(
    ("case", "world_size", "fields"),
    [
        ("1", 2, {"ep": 2}),
        ("TP2", 1, {}),
        ("TP2 EP4 ZeRO2", 1, {}),
        ("1 no gate", 2, {"tp": 2, "sequence_parallel": True}),
    ],
)
def test_other_layout_goes_on_with_the_same_values(case, world_size, fields, saved_run, tmp_path):
    """Norms only without Engram's gate: its pole near zero scores amplifies another order of sums
    (8e-5 here).
    """
    num_figures = 2 if case == "1 no gate" else 1
    path, expected, *_ = saved_run(case)[0]
    config = replace(CASES[case][1], parallel=layout(**fields))
    for _, _, figures in run_ranks(
        load_and_go_on,
        world_size,
        config,
        path.parent,
        2,
        tmp_path,
    ):
        got = np.array(figures)[:, :num_figures]
        want = np.array(expected)[:2, :num_figures]
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_same_tensors(path, latest(tmp_path))


def test_bf16_masters_survive_other_layouts_bit_by_bit(saved_run, tmp_path):
    path = saved_run("TP2 bf16")[0][0]
    run_ranks(
        load_and_go_on,
        2,
        config_of({"ep": 2}, "bf16"),
        path.parent,
        0,
        tmp_path / "b",
    )
    run_ranks(
        load_and_go_on,
        1,
        config_of({}, "fp32"),
        tmp_path / "b",
        0,
        tmp_path / "c",
    )
    assert_same_tensors(path, latest(tmp_path / "b"))
    assert_same_tensors(path, latest(tmp_path / "c"))


@pytest.fixture(scope="module")
def saved(saved_run):
    """A checkpoint of one rank, with what the trainer that saved it held."""
    ((path, _, logits, parameters),) = saved_run("1")
    return SimpleNamespace(path=path, logits=logits, parameters=parameters)


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of it to be damaged."""
    return Path(shutil.copytree(saved.path, tmp_path / "copy" / saved.path.name))


def fresh_model(
    config: RunConfig, token_map: TokenMap | None = None
) -> tuple[HybridModel, EngramMemory | None]:
    """A model and tables of one process, with other values than any run."""
    mesh = single_mesh()
    cpu = torch.device("cpu")
    model = build_model(
        config.model,
        mesh,
        seed=99,
        dtype=DTYPES[config.train.dtype],
        device=cpu,
    )
    other_seed = replace(config, train=replace(config.train, seed=99))
    return model, build_memory(
        other_seed,
        mesh,
        token_map or made_up_token_map(),
        cpu,
    )


def read_into(path: Path, config: RunConfig | None = None, token_map: TokenMap | None = None):
    """load_weights into a fresh model of one process."""
    model, memory = fresh_model(config or config_of({}), token_map)
    return model, memory, load_weights(path, model, single_mesh(), memory)


def test_saved_values_are_the_models(saved):
    """Against the parameters themselves, packed parts concatenated: a wrong map that both ways
    share would show.
    """
    tensors = read_plainly(saved.path)
    for name, expected in saved.parameters.items():
        parts = [
            tensors[key]
            for key in tensors
            if key == f"fp32/{name}" or key.startswith(f"fp32/{name}.")
        ]
        np.testing.assert_array_equal(torch.cat(parts), expected, err_msg=name)
    for part, size in {"z": 64, "x": 64, "B": 12, "C": 12, "dt": 8}.items():
        assert tensors[f"exp_avg/layers.0.mixer.in_proj.weight.{part}"].shape == (size, 32)
    assert tensors["exp_avg_sq/layers.1.mixer.experts.down"].shape[0] == 4
    steps = {name: float(values) for name, values in tensors.items() if name.startswith("step/")}
    assert steps == {
        f"step/{tag}": SAVED_AT for tag in ("dense-decay", "dense-plain", "experts-decay")
    }
    assert tensors["buffer/layers.1.mixer.bias"].abs().max() > 0
    assert tensors["engram.1.step"].dtype == torch.int32
    assert tensors["engram.1.step"].max() == SAVED_AT


def test_weights_give_the_trainers_logits(saved):
    model, memory, manifest = read_into(saved.path)
    assert manifest["step"] == SAVED_AT
    assert torch.equal(logits_of(model, memory), torch.from_numpy(saved.logits))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_weights_of_a_tensor_parallel_run_give_its_logits_on_one_process(
    dtype, tolerance, saved_run
):
    results = saved_run("TP2" if dtype == "fp32" else "TP2 bf16")
    model, memory, _ = read_into(results[0][0], config_of({}, dtype))
    for _, _, logits, _ in results:
        assert_close(
            "logits",
            logits_of(model, memory),
            torch.from_numpy(logits),
            tolerance,
        )


def load_weights_on_ranks(path: Path, config: RunConfig):
    trainer = make_trainer(config)
    load_weights(
        path,
        trainer.model,
        trainer.mesh,
        trainer.memory,
    )
    return logits_of(trainer.model, trainer.memory).numpy()


def test_weights_load_on_several_ranks(saved):
    for logits in run_ranks(
        load_weights_on_ranks,
        2,
        saved.path,
        config_of({"tp": 2}),
    ):
        assert_close(
            "logits",
            torch.from_numpy(logits),
            torch.from_numpy(saved.logits),
            1e-5,
        )


def save_before_the_first_step(config: RunConfig, directory: Path):
    trainer = make_trainer(config)
    save(directory, trainer, 0, {})
    return go_on(trainer, 0, 2)


def test_step_0(tmp_path):
    config = config_of({})
    expected = run_ranks(train_figures, 1, config)
    assert (
        run_ranks(
            save_before_the_first_step,
            1,
            config,
            tmp_path / "a",
        )
        == expected
    )
    ((_, _, figures),) = run_ranks(
        load_and_go_on,
        1,
        config,
        tmp_path / "a",
        2,
        tmp_path / "b",
    )
    assert [figures] == expected


def train_figures(config: RunConfig):
    return train_steps(config, 2)[1]


def test_model_without_engram_or_experts(tmp_path):
    config = config_of({}, pattern="M-", engram=None)
    ((path, *_, logits, _),) = run_ranks(run_and_save, 1, config, tmp_path, 0)
    model, memory, _ = read_into(path, config)
    assert memory is None
    assert torch.equal(logits_of(model, memory), torch.from_numpy(logits))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)


def place_of(path: Path, name: str) -> int:
    """A byte in the middle of the first chunk of a tensor."""
    places = dcp.FileSystemReader(path).read_metadata().storage_data.items()
    return next(place.offset + place.length // 2 for index, place in places if index.fqn == name)


@pytest.mark.parametrize(
    "name", ["fp32/head.weight", "exp_avg_sq/layers.1.mixer.experts.down", "engram.3.weight"]
)
def test_a_flipped_byte_is_found_and_its_tensor_named(copy, name):
    flip(copy / "__0_0.distcp", place_of(copy, name))
    with pytest.raises(RunError, match=rf"__0_0.distcp differs from its checksum \(in {name}\)"):
        read_into(copy)


def test_a_truncated_file_is_found_and_its_tensors_named(copy):
    size = (copy / "__0_0.distcp").stat().st_size
    last = last_tensor(copy)
    with open(copy / "__0_0.distcp", "r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(
        RunError, match=rf"__0_0.distcp has {size - 100} bytes, expected {size} \(in {last}\)"
    ):
        read_into(copy)
    assert latest(copy.parent) is None


def last_tensor(path: Path) -> str:
    places = dcp.FileSystemReader(path).read_metadata().storage_data.items()
    return max(places, key=lambda item: item[1].offset)[0].fqn


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(RunError, match=f"{file} is missing"):
        read_into(copy)
    assert latest(copy.parent) is None


@pytest.mark.parametrize("file", [".metadata", "manifest.json"])
def test_damage_of_what_describes_the_files_is_found(copy, file):
    flip(copy / file, (copy / file).stat().st_size // 2)
    with pytest.raises(RunError, match=f"{file} (differs|cannot be read)"):
        read_into(copy)


def test_a_checkpoint_without_manifest_or_name_is_refused(copy):
    with pytest.raises(RunError, match="is no complete checkpoint"):
        read_into(copy.rename(copy.with_name(copy.name + ".tmp")))
    (copy.with_name(copy.name + ".tmp")).rename(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"has no manifest\.json"):
        read_into(copy)
    with pytest.raises(RunError, match="does not exist"):
        read_into(copy.parent / "step-00000099")


def test_a_newer_format_is_refused(copy):
    rewrite(copy, format=storage.FORMAT + 1)
    with pytest.raises(RunError, match=f"format {storage.FORMAT + 1}, newer than {storage.FORMAT}"):
        read_into(copy)


def test_format_1_is_read_and_verified(copy):
    """It had one CRC-32 a file."""
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}
        for path in copy.iterdir()
        if path.name != "manifest.json"
    }
    rewrite(copy, format=1, files=files)
    read_into(copy)
    flip(copy / "__0_0.distcp", place_of(copy, "fp32/head.weight"))
    with pytest.raises(
        RunError, match=r"__0_0.distcp differs from its checksum \(in .*and \d+ more\)"
    ):
        read_into(copy)


def test_another_model_is_refused_with_all_names_and_shapes(saved):
    with pytest.raises(RunError) as error:
        read_into(saved.path, config_of({}, mlp_dim=40, pattern="MES*-L"))
    text = str(error.value)
    assert "model.pattern=MES*-L is MES*-LE in" in text
    assert "model.mlp_dim=40 is 48 in" in text
    assert (
        "fp32/layers.4.mixer.down.weight is float32 [32, 48] in it and float32 [32, 40] here"
        in text
    )
    assert "fp32/layers.6.mixer.router is in it and not in this model" in text


def test_the_same_shapes_with_another_meaning_are_refused(saved):
    tiny = config_of({}).model
    for field, value in {"norm_eps": 1e-3, "moe": replace(tiny.moe, top_k=1)}.items():
        with pytest.raises(RunError, match=rf"model.{field}[.\w]*=[\d.]+ is "):
            read_into(saved.path, config_of({}, **{field: value}))
    read_into(saved.path, config_of({}, moe=replace(tiny.moe, bias_rate=0.5)))


def test_another_token_map_is_refused(saved):
    other = made_up_token_map()
    with pytest.raises(RunError, match=r"token map=.* is not the one of"):
        read_into(saved.path, token_map=replace(other, ids=other.ids.flip(0)))


def test_tables_that_are_left_out_are_missed(saved):
    model, _ = fresh_model(config_of({}))
    with pytest.raises(RunError, match=r"engram.1.weight is in it and not in this model"):
        load_weights(saved.path, model, single_mesh(), None)


def load_damaged(config: RunConfig, path: Path):
    trainer = make_trainer(config)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    try:
        load(path, trainer)
    except RunError as error:
        unchanged = all(map(torch.equal, before, trainer.model.parameters()))
        return str(error), unchanged


def test_every_rank_tells_of_damage_before_anything_changes(copy):
    flip(copy / "__0_0.distcp", place_of(copy, "fp32/embedding.weight"))
    results = run_ranks(load_damaged, 2, config_of({"ep": 2}), copy)
    assert all("(in fp32/embedding.weight)" in text and unchanged for text, unchanged in results)
    assert results[0] == results[1]


# --- a run that begins with the weights of another ---


def begun_with(config: RunConfig, source: Path, tokenizer: Path, directory: Path):
    """On this rank: what a trainer holds that begins with a checkpoint's weights, saved, and its
    first figures.
    """
    trainer = make_trainer(replace(config, train=replace(config.train, seed=5)))
    load_initial(source, trainer, tokenizer)
    path = save(directory, trainer, 0, {})
    return path, go_on(trainer, SAVED_AT, 1)


@pytest.mark.parametrize(
    "layout_of", [{}, {"tp": 2, "ep": 2, "zero_stage": 2}], ids=["same layout", "TP2 x EP2"]
)
def test_a_run_begins_with_the_weights_of_another_and_nothing_else(tmp_path, layout_of):
    source, expected, _, _ = run_ranks(
        run_and_save,
        1,
        config_of({}),
        tmp_path / "a",
        1,
    )[0]
    num_ranks = 2 if layout_of else 1
    runs = run_ranks(
        begun_with,
        num_ranks,
        config_of(layout_of),
        source,
        tmp_path / "tokenizer.json",
        tmp_path / "b",
    )
    mine = read_plainly(runs[0][0])
    theirs = read_plainly(source)
    for name, values in mine.items():
        if is_weight(name):
            assert torch.equal(values, theirs[name]), name
        else:
            assert not values.any(), f"{name} does not begin at zero"
    assert any(is_weight(name) and name.startswith("engram.") for name in mine)
    (loss, _) = runs[0][1][0]
    (expected_loss, _) = expected[0]
    assert loss == pytest.approx(expected_loss, rel=1e-6)


def refused_start(config: RunConfig, source: Path, tokenizer: Path) -> str:
    trainer = make_trainer(config)
    with pytest.raises(RunError) as caught:
        load_initial(source, trainer, tokenizer)
    return str(caught.value)


def test_weights_of_another_tokenizer_are_refused(tmp_path):
    (source, *_) = run_ranks(
        run_and_save,
        1,
        config_of({}),
        tmp_path / "a",
        0,
    )[0]
    (source / "tokenizer.json").write_text("theirs")
    (tmp_path / "tokenizer.json").write_text("ours")
    for said in run_ranks(
        refused_start, 2, config_of({"tp": 2}), source, tmp_path / "tokenizer.json"
    ):
        assert "another tokenizer than that of" in said
        assert f"launch prepare --tokenizer {source}/tokenizer.json" in said
