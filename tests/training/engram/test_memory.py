"""Rows that move ahead of their use: the same run, bit for bit, as fetching when needed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from parallel.engram_table import tables as table_module
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, make_trainer, tiny_config
from tests.parity import quiet_libraries
from training.data.dataset import Batch
from training.model.config import EngramConfig
from training.step import train_step

STEPS = 50
LENGTH = 24


def repeating_batches(step: int, rank: int, num_micro: int) -> list[Batch]:
    """The same few n-grams in every step and on every rank: each step updates rows that the next
    one has fetched.
    """
    batches = []
    for micro in range(num_micro):
        generator = torch.Generator().manual_seed(1000 * (step // 2) + 10 * micro + rank)
        phrase = torch.randint(3, 9, (1, 6), generator=generator)
        ids_BL = phrase.repeat(2, 1 + LENGTH // 6)
        documents_BL = torch.zeros(2, LENGTH, dtype=torch.int32)
        batches.append(
            Batch(
                ids_BL[:, :LENGTH],
                ids_BL[:, 1 : LENGTH + 1],
                documents_BL,
                2 * LENGTH,
            )
        )
    return batches


def run(prefetch: int, ranks: int, num_micro: int, table: dict) -> dict:
    """Losses, norms and the whole table of a run."""
    quiet_libraries()
    engram = EngramConfig(
        layers=(0, 1),
        num_heads=2,
        head_dim=8,
        table_size=50,
        init_std=0.5,
    )
    config = tiny_config(pattern="M-", engram=engram)
    train = replace(config.train, micro_batch=2, global_batch=2 * num_micro * ranks)
    config = replace(
        config,
        train=train,
        table=replace(config.table, prefetch=prefetch, **table),
        parallel=layout(),
    )
    trainer = make_trainer(config)
    rank = trainer.mesh.rank("batch")
    figures = []
    coming = repeating_batches(0, rank, num_micro)
    for step in range(STEPS):
        batches = coming
        coming = repeating_batches(step + 1, rank, num_micro)
        result = train_step(
            trainer,
            batches,
            3e-3,
            step,
            list if step == STEPS - 1 else lambda coming=coming: coming,
        )
        figures.append((result.loss, result.grad_norm))
        assert trainer.memory.num_coming == (0 if step == STEPS - 1 else min(prefetch, num_micro))
    state = trainer.memory.tables.state()
    return {
        "figures": figures,
        "state": {name: piece.tensor.float().numpy() for name, piece in state.items()},
    }


def same(one: dict, other: dict) -> bool:
    states = one["state"], other["state"]
    return one["figures"] == other["figures"] and all(
        np.array_equal(states[0][n], states[1][n]) for n in states[0]
    )


@pytest.mark.parametrize(
    ("depth", "ranks", "num_micro", "table"),
    [
        (1, 1, 1, {}),
        (3, 1, 2, {"rows": "bf16", "optimizer": "rowwise_adam"}),
        (1, 2, 1, {}),
        (2, 2, 2, {"optimizer": "momentum_sinkhorn"}),
    ],
)
def test_prefetched_is_synchronous_bit_for_bit(depth, ranks, num_micro, table):
    synchronous = run_ranks(run, ranks, 0, ranks, num_micro, table)
    ahead = run_ranks(run, ranks, depth, ranks, num_micro, table)
    assert all(same(one, other) for one, other in zip(synchronous, ahead, strict=True))


def stale_run() -> dict:
    """A run whose steps do not patch what has been fetched ahead."""

    def nothing(changed_U, read, route, mesh):
        return torch.empty(0, dtype=torch.int64), read(torch.empty(0, dtype=torch.int64))

    table_module.resend = nothing
    return run(1, 1, 1, {})


def test_without_patches_the_run_would_be_another():
    (stale,) = run_ranks(stale_run, 1)
    (synchronous,) = run_ranks(run, 1, 0, 1, 1, {})
    assert stale["figures"][0] == synchronous["figures"][0]
    assert not same(stale, synchronous)
