"""Validation loss: the mean cross-entropy over the first rows of the validation split, the same on
every layout.
"""

import math
from dataclasses import dataclass

import torch

from parallel.collectives import sum_in_place
from parallel.experts import take_exchange_seconds
from training.data.dataset import Row, ValidationRows
from training.data.loader import load_step
from training.engram.memory import memory_of
from training.trainer import Trainer


@dataclass
class FirstRows:
    """The first rows of a split; every row after them is masked padding."""

    rows: ValidationRows
    count: int
    seq_length: int

    def read(self, index: int) -> Row:
        """Row ``index``, padding from ``count`` on."""
        return self.rows.read(index if index < self.count else len(self.rows))


@torch.no_grad()
def evaluate(trainer: Trainer, rows: ValidationRows, num_rows: int) -> float:
    """Mean loss in nats a target over the first ``num_rows`` rows, or all where there are fewer.
    Collective over world.

    The last round is filled up with masked padding, so that every data rank computes equally many
    batches.
    """
    mesh = trainer.mesh
    micro_batch = trainer.config.train.micro_batch
    per_round = micro_batch * mesh.size("batch")
    first = FirstRows(rows, min(num_rows, len(rows)), rows.seq_length)
    total = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    for start in range(0, first.count, per_round):
        for batch in load_step(
            first, start, per_round, micro_batch, mesh.rank("batch"), mesh.size("batch")
        ):
            fetched = trainer.rows_for_evaluation(batch)
            moved = batch.to(trainer.device)
            loss, _ = trainer.model(
                moved.input_ids_BL, moved.targets_BL, moved.seq_idx_BL, memory_of(fetched)
            )
            total += torch.tensor(
                [float(loss), moved.num_targets], dtype=torch.float64, device=trainer.device
            )
    take_exchange_seconds(trainer.model)  # none of it belongs to the next step
    sum_in_place(total, mesh.group("loss"))
    return float(total[0] / total[1].clamp_min(1))


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
