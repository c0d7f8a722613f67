"""Checkpoints of the tiny model for tests that read them: made on several ranks, read as plain DCP
reads.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from parallel.mesh import single_mesh
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import (
    layout,
    made_up_batches,
    made_up_rows,
    made_up_token_map,
    make_trainer,
    tiny_config,
)
from training.checkpoint import load_weights, save
from training.checkpoint.format import checksums, storage
from training.config import RunConfig
from training.engram.memory import build_memory, memory_of
from training.model.model import build_model
from training.run_file import save_run_json
from training.step import train_step
from training.trainer import Trainer


def _train_and_save(config: RunConfig, directory: Path, steps: int) -> None:
    trainer = make_trainer(config)
    for step in range(steps):
        batches = made_up_batches(
            step,
            config,
            trainer.mesh.rank("batch"),
            trainer.mesh.size("batch"),
        )
        train_step(trainer, batches, 1e-2, step)
        save(directory, trainer, step + 1, {"data": "abc"})


def save_run(config: RunConfig, run: Path, world_size: int, steps: int = 1) -> list[Path]:
    """A run with a checkpoint after each step, trained on ``world_size`` ranks."""
    run.mkdir(parents=True)
    save_run_json(run / "run.json", config, world_size)
    run_ranks(
        _train_and_save,
        world_size,
        config,
        run / "checkpoints",
        steps,
    )
    return [run / "checkpoints" / f"step-{step + 1:08d}" for step in range(steps)]


def read_plainly(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by DCP alone."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.full(tuple(md.size), -7).to(md.properties.dtype) for name, md in saved.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def loaded_logits(path: Path, config: RunConfig) -> torch.Tensor:
    """(2, L, V): logits of a fresh model of one process that reads the weights."""
    mesh = single_mesh()
    cpu = torch.device("cpu")
    model = build_model(
        config.model,
        mesh,
        seed=99,
        dtype=torch.float32,
        device=cpu,
    ).eval()
    memory = build_memory(config, mesh, made_up_token_map(), cpu)
    load_weights(path, model, mesh, memory)
    ids_BL = sample_ids()
    return model.logits(
        ids_BL, None, {} if memory is None else memory_of(memory.look_up(ids_BL, None))
    )


def sample_ids() -> torch.Tensor:
    """Tokens (2, L) of made-up rows, the same for every model."""
    return made_up_rows(77)[0][:2]


def make_consistent(path: Path, **fields) -> None:
    """Give a tampered checkpoint the manifest that one who wishes to deceive would give it."""
    manifest = json.loads((path / "manifest.json").read_text()) | fields
    manifest.pop("checksum")
    manifest["files"] = checksums.file_records(path, sorted(manifest["files"]))
    text = json.dumps(manifest | {"checksum": storage._manifest_checksum(manifest)})
    (path / "manifest.json").write_text(text)


def config_of(fields: dict, dtype: str = "fp32", **model) -> RunConfig:
    """The tiny model on a layout, in a compute type."""
    config = tiny_config(**model)
    return replace(config, parallel=layout(**fields), train=replace(config.train, dtype=dtype))


def go_on(trainer: Trainer, first: int, num_steps: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of the next steps."""
    figures = []
    for step in range(first, first + num_steps):
        batches = made_up_batches(
            step, trainer.config, trainer.mesh.rank("batch"), trainer.mesh.size("batch")
        )
        result = train_step(trainer, batches, 1e-2, step)
        figures.append((result.loss, result.grad_norm))
    return figures


def assert_same_tensors(one: Path, other: Path) -> None:
    """Both checkpoints hold the same tensors, bit by bit."""
    mine = read_plainly(one)
    theirs = read_plainly(other)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert torch.equal(values, theirs[name]), name


def rewrite(path: Path, **fields) -> None:
    """Change fields of a manifest as another version would have written them."""
    manifest = storage.read_manifest(path) | fields
    (path / "manifest.json").write_text(
        json.dumps(manifest | {"checksum": storage._manifest_checksum(manifest)})
    )
