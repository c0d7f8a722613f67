"""Validation loss: the mean over exactly the rows asked for, on every layout, and training does not
notice it.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.experts import take_exchange_time
from parallel.mesh import build_mesh
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, tiny_config
from training.config import RunConfig
from training.data.dataset import PackedRows, ValidationRows
from training.data.files import TokenFiles
from training.data.loader import load_step
from training.engram.memory import memory_of, run_token_map
from training.evaluate import evaluate
from training.step import train_step
from training.trainer import Trainer, build_trainer

LENGTH = 24
NUM_ROWS = (
    1,
    5,
    6,
    10**6,
)  # ranks x micro_batch is 4: rounds that are filled up, one that is whole, all rows


def config_of(path: Path, **parallel) -> RunConfig:
    run = tiny_config(vocab_size=384)
    data = replace(run.data, path=str(path), seq_length=LENGTH)
    return replace(run, data=data, parallel=layout(**parallel))


def make_trainer(config: RunConfig) -> tuple[Trainer, TokenFiles]:
    files = TokenFiles.open(config.data.path)
    mesh = build_mesh(config.parallel)
    return build_trainer(
        config,
        mesh,
        torch.device("cpu"),
        run_token_map(config, files),
    ), files


def losses(path: Path, parallel: dict) -> list[float]:
    trainer, files = make_trainer(config_of(path, **parallel))
    return [evaluate(trainer, ValidationRows(files, LENGTH), count) for count in NUM_ROWS]


@torch.no_grad()
def row_by_row(path: Path) -> list[float]:
    """The oracle: one row after another."""
    trainer, files = make_trainer(config_of(path))
    rows = ValidationRows(files, LENGTH)
    sums = []
    counts = []
    for index in range(len(rows)):
        (batch,) = load_step(rows, index, 1, 1)
        memory = memory_of(trainer.rows_for_evaluation(batch))
        sums.append(
            float(
                trainer.model(
                    batch.input_ids_BL,
                    batch.targets_BL,
                    batch.seq_idx_BL,
                    memory,
                )[0]
            )
        )
        counts.append(batch.num_targets)
    return [sum(sums[:count]) / sum(counts[:count]) for count in NUM_ROWS]


@pytest.fixture(scope="module")
def expected(corpus):
    values = run_ranks(row_by_row, 1, corpus)[0]
    assert len(set(values)) == len(values)
    return values


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, {}), (2, {"ep": 2}), (2, {"tp": 2}), (4, {"tp": 2, "ep": 4})],
    ids=["1", "DP2", "EP2", "TP2", "TP2 x EP4"],
)
def test_every_layout_gives_the_mean_over_the_rows(corpus, expected, world_size, parallel):
    for got in run_ranks(losses, world_size, corpus, parallel):
        assert got == pytest.approx(expected, rel=1e-5)


def trained(path: Path, evaluating: bool) -> list[tuple[float, float]]:
    """Losses and gradient norms of three steps."""
    config = config_of(path, ep=2)
    trainer, files = make_trainer(config)
    rows = PackedRows(files, "train", LENGTH)
    mesh = trainer.mesh
    figures = []
    for step in range(3):
        batches = load_step(
            rows,
            step * config.train.global_batch,
            config.train.global_batch,
            2,
            mesh.rank("batch"),
            2,
        )
        result = train_step(trainer, batches, 1e-2, step)
        figures.append((result.loss, result.grad_norm))
        if evaluating:
            evaluate(trainer, ValidationRows(files, LENGTH), 6)
            assert take_exchange_time(trainer.model).seconds() == 0.0
    return figures


def test_training_does_not_notice_it(corpus):
    assert run_ranks(trained, 2, corpus, True) == run_ranks(trained, 2, corpus, False)
