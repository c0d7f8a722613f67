"""Checkpoints whose rows are in another format than the run's, or of another table optimizer.

R rows, W row width, K scales of a row.
"""

from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from kernels.table_rows.formats import from_fp8, row_keys, to_bf16, to_fp8
from parallel.engram_table import EngramTables
from parallel.engram_table import tables as table_module
from parallel.errors import RunError
from parallel.mesh import single_mesh
from tests.helpers.ranks import run_ranks
from tests.helpers.saved import read_plainly
from tests.helpers.tiny import (
    layout,
    made_up_batches,
    made_up_token_map,
    make_trainer,
    tiny_config,
    train_steps,
)
from training.checkpoint import latest, load, load_weights, save
from training.checkpoint.format import planners
from training.checkpoint.format.storage import read_manifest
from training.checkpoint.format.stored_rows import is_row_state, row_format, row_optimizer, told
from training.config import RunConfig
from training.engram.memory import build_memory
from training.model.config import EngramConfig
from training.model.model import build_model
from training.run.session import tell
from training.step import train_step

CPU = torch.device("cpu")
SAVED_AT = 3
SEED = 5
CHUNK_BYTES = 5000  # 39 rows of fp32, 156 of fp8; a table has 200
ROWS = [f"engram.{layer}.weight" for layer in (0, 1)]


def config_of(**table) -> RunConfig:
    """A model whose rows can be stored in all formats."""
    engram = EngramConfig(
        layers=(0, 1),
        num_heads=2,
        head_dim=32,
        table_size=50,
        init_std=0.5,
    )
    config = tiny_config(pattern="-*", engram=engram)
    train = replace(config.train, seed=SEED)
    return replace(
        config,
        parallel=layout(),
        table=replace(config.table, **table),
        train=train,
    )


def train_and_save(config: RunConfig, run: Path) -> float:
    """Saves in chunks of a few rows; the loss of the step that follows."""
    planners.MAX_CHUNK_BYTES = CHUNK_BYTES
    trainer, _ = train_steps(config, SAVED_AT)
    save(
        run / "checkpoints",
        trainer,
        SAVED_AT,
        {"data_fingerprint": "abc"},
    )
    return next_loss(trainer)


def next_loss(trainer) -> float:
    batches = made_up_batches(
        SAVED_AT, trainer.config, trainer.mesh.rank("batch"), trainer.mesh.size("batch")
    )
    return train_step(trainer, batches, 1e-2, SAVED_AT).loss


def resume(run: Path, again: dict[Path, RunConfig]) -> dict[Path, tuple[str, float]]:
    """Go on from ``run`` with other tables, each of which is saved as it was read; what was told,
    and the next loss.
    """
    planners.MAX_CHUNK_BYTES = CHUNK_BYTES
    table_module.ASSIGNED_ROWS = 7
    results = {}
    for other, config in again.items():
        trainer = make_trainer(config)
        printed = StringIO()
        with redirect_stdout(printed):
            path = latest(run / "checkpoints")
            tell(f"resumed from {path}", load(path, trainer), trainer)
        save(
            other / "checkpoints",
            trainer,
            SAVED_AT,
            {"data_fingerprint": "abc"},
        )
        results[other] = printed.getvalue(), next_loss(trainer)
    return results


def resume_each(runs: dict[Path, dict[Path, RunConfig]]) -> list:
    return [resume(run, again) for run, again in runs.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of fp32 rows and Adam on two ranks, and the loss of the step after its checkpoint."""
    directory = tmp_path_factory.mktemp("run")
    return directory, run_ranks(train_and_save, 2, config_of(), directory)[0]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return read_plainly(run / "checkpoints" / "step-00000003")


def keys_of(name: str, num_rows: int) -> torch.Tensor:
    """The keys of a layer's rows for the update of number -1."""
    layer = int(name.split(".")[1])
    return row_keys(torch.arange(num_rows) + (layer << 40), torch.full((num_rows,), -1), SEED)


def assert_all_but_rows_equal(mine: dict, theirs: dict) -> None:
    others = [name for name in theirs if not name.startswith("engram.") or is_row_state(name)]
    assert set(others) == {name for name in mine if ".weight_scale" not in name} - set(ROWS)
    assert {name.split(".")[-1] for name in others if name.startswith("engram.")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    for name in others:
        assert torch.equal(mine[name], theirs[name]), name


def test_rows_become_those_of_the_format_and_come_back(run, tmp_path):
    """fp32 on two ranks, bf16 and fp8 on one, fp32 and bf16 on two, bf16 on one; all the rest stays
    bit by bit.
    """
    first, loss = run
    short = {tmp_path / form: config_of(rows=form) for form in ("bf16", "fp8")}
    (results,) = run_ranks(resume, 1, first, short)
    for other, (text, got) in results.items():
        assert f"table rows: converted from fp32 to {other.name}\n" in text
        assert got == pytest.approx(loss, rel=2e-2)
    whole, bf16, fp8 = (tensors_of(path) for path in (first, *short))
    for name in ROWS:
        values_RW = whole[name]
        keys_R = keys_of(name, len(whole[name]))
        assert torch.equal(bf16[name], to_bf16(values_RW, keys_R))
        codes_RW, scales_RK = to_fp8(values_RW, keys_R)
        assert torch.equal(fp8[name], codes_RW)
        assert torch.equal(fp8[f"{name}_scale"], scales_RK)
    for tensors in (bf16, fp8):
        assert_all_but_rows_equal(tensors, whole)

    back = {"bf16": {tmp_path / "b": config_of()}, "fp8": {tmp_path / "c": config_of(rows="bf16")}}
    run_ranks(resume_each, 2, {tmp_path / form: again for form, again in back.items()})
    run_ranks(
        resume,
        1,
        tmp_path / "b",
        {tmp_path / "d": config_of(rows="bf16")},
    )
    from_bf16, from_eight, again = (tensors_of(tmp_path / name) for name in "bcd")
    for name in ROWS:
        assert torch.equal(from_bf16[name], bf16[name].float())
        assert torch.equal(
            from_eight[name], from_fp8(fp8[name], fp8[f"{name}_scale"], torch.bfloat16)
        )
        assert from_eight[name].dtype == torch.bfloat16
        assert torch.equal(again[name], bf16[name]), "what a format can hold is rounded again"
    for tensors in (from_bf16, from_eight, again):
        assert_all_but_rows_equal(tensors, whole)


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_weights_alone_are_the_same_rows(run, form, monkeypatch):
    """As generation and analysis read them, with the rows that a resumed run has; and the same
    again; in blocks.
    """
    config = config_of(rows=form)
    assign = EngramTables.assign
    blocks = []
    monkeypatch.setattr(
        EngramTables, "assign", lambda *call: blocks.append(len(call[-1])) or assign(*call)
    )
    model = build_model(
        config.model,
        single_mesh(),
        seed=9,
        dtype=torch.float32,
        device=CPU,
    )
    for _ in range(2):
        memory = build_memory(
            config,
            single_mesh(),
            made_up_token_map(),
            CPU,
            trainable=False,
        )
        load_weights(
            latest(run[0] / "checkpoints"),
            model,
            single_mesh(),
            memory,
        )
        state = memory.tables.state()
        for name in ROWS:
            values_RW = tensors_of(run[0])[name]
            keys_R = keys_of(name, len(values_RW))
            expected = (
                (to_bf16(values_RW, keys_R),) if form == "bf16" else to_fp8(values_RW, keys_R)
            )
            assert all(
                torch.equal(state[n].tensor, x)
                for n, x in zip((name, f"{name}_scale"), expected, strict=False)
            )
    assert max(blocks) <= CHUNK_BYTES // 128
    assert sum(blocks) == 2 * sum(state[name].num_rows for name in ROWS)


def test_another_optimizer_begins_anew_where_that_is_said(run, tmp_path):
    first, loss = run
    others = {
        tmp_path / "rowwise": config_of(optimizer="rowwise_adam", restart_optimizer=True),
        tmp_path / "sinkhorn": config_of(
            optimizer="momentum_sinkhorn", restart_optimizer=True, rows="fp8"
        ),
        tmp_path / "same": config_of(restart_optimizer=True),
    }
    (results,) = run_ranks(resume, 1, first, others)
    whole = tensors_of(first)
    assert torch.equal(tensors_of(tmp_path / "same")["engram.0.exp_avg"], whole["engram.0.exp_avg"])
    assert results.pop(tmp_path / "same")[0].count("\n") == 1
    for other, (text, got) in results.items():
        tensors = tensors_of(other)
        optimizer = others[other].table.optimizer
        assert (
            f"table optimizer: {optimizer} begins anew, the state of adam is left behind\n" in text
        )
        assert got == pytest.approx(loss, rel=2e-2)
        states = [name for name in tensors if is_row_state(name)]
        assert len(states) == 6
        assert not any(tensors[name].any() for name in states)
        for name in set(tensors) - set(states) - {f"{row}_scale" for row in ROWS}:
            assert name in ROWS or torch.equal(tensors[name], whole[name]), name
    assert all(torch.equal(tensors_of(tmp_path / "rowwise")[name], whole[name]) for name in ROWS)


def refused(run: Path, configs: list[RunConfig]) -> list[tuple[str, bool]]:
    """What ``load`` says, and whether it left everything as it was."""
    results = []
    for config in configs:
        trainer = make_trainer(config)
        live = [
            *trainer.model.parameters(),
            *(piece.tensor for piece in trainer.memory.tables.state().values()),
        ]
        before = [values.detach().clone() for values in live]
        with pytest.raises(RunError) as error:
            load(latest(run / "checkpoints"), trainer)
        results.append((str(error.value), all(map(torch.equal, live, before))))
    return results


def test_refusals_change_nothing(run, tmp_path):
    """Another optimizer, a table of another size in another format, a damaged chunk on its way into
    another format.
    """
    path = latest(run[0] / "checkpoints")
    copy = tmp_path / "checkpoints" / path.name
    copy.parent.mkdir()
    copy.mkdir()
    for file in path.iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".distcp":
            data[len(data) // 2] ^= 1
        (copy / file.name).write_bytes(data)
    larger = config_of(rows="bf16")
    larger = replace(
        larger, model=replace(larger.model, engram=replace(larger.model.engram, table_size=70))
    )
    ((other, size),) = run_ranks(
        refused, 1, run[0], [config_of(optimizer="momentum_sinkhorn"), larger]
    )
    assert (
        "table.optimizer=momentum_sinkhorn cannot go on from the state of the rows in" in other[0]
    )
    assert "--table.restart_optimizer True" in other[0]
    assert "model.engram.table_size=70 is 50 in" in size[0]
    ((damaged,),) = run_ranks(refused, 1, tmp_path, [config_of(rows="fp8")])
    assert "differs from its checksum" in damaged[0]
    assert other[1] and size[1] and damaged[1]  # noqa: PT018


def test_formats_and_optimizers_are_known_by_their_tensors(run):
    metadata = read_manifest(latest(run[0] / "checkpoints"))["tensors"]
    assert row_format(metadata) == "fp32"
    assert told(metadata, config_of().table) == []
    for optimizer in ("adam", "rowwise_adam", "momentum_sinkhorn"):
        memory = build_memory(
            config_of(optimizer=optimizer), single_mesh(), made_up_token_map(), CPU
        )
        assert (
            row_optimizer(
                {name: piece.tensor.shape for name, piece in memory.tables.state().items()}
            )
            == optimizer
        )
    assert row_optimizer({"fp32/head": (3,), "engram.0.weight": (4, 3)}) is None
    assert (
        row_format({})
        is row_format({"engram.0.weight": {"dtype": "float16", "shape": [4, 3]}})
        is None
    )
