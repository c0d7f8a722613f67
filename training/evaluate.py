"""Validation loss: the mean cross-entropy over the first rows of the validation split, the same on
every layout.
"""

import math
from dataclasses import dataclass

import torch

from parallel.collectives import sum_in_place
from parallel.device import to_device
from parallel.experts import take_exchange_time
from training.data.dataset import Batch, Row, ValidationRows
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
        padding = len(self.rows)  # the first number after the last row
        return self.rows.read(index if index < self.count else padding)


@torch.no_grad()
def evaluate(trainer: Trainer, rows: ValidationRows, num_rows: int) -> float:
    """Mean loss in nats a target over the first ``num_rows`` rows, or all where there are fewer.
    Collective over world.

    The last round is filled up with masked padding, so that every data rank computes equally many
    batches.
    """
    mesh = trainer.mesh
    micro_batch = trainer.config.train.micro_batch
    num_readers = mesh.size("batch")
    per_round = micro_batch * num_readers
    count = min(num_rows, len(rows))
    first = FirstRows(rows, count, rows.seq_length)
    # fp64: what rounding loses over millions of targets does not show in their mean.
    total = torch.zeros((), dtype=torch.float64, device=trainer.device)
    num_targets = 0
    for start in range(0, count, per_round):
        batches = load_step(
            first,
            start,
            per_round,
            micro_batch,
            mesh.rank("batch"),
            num_readers,
        )
        for batch in batches:
            total += _loss_sum(trainer, batch)
            num_targets += batch.num_targets
    take_exchange_time(trainer.model)  # none of it belongs to the next step
    counted = to_device(torch.tensor(num_targets, dtype=torch.float64), trainer.device)
    sums = torch.stack([total, counted])
    sum_in_place(sums, mesh.group("loss"))
    loss_sum, all_targets = sums.tolist()
    return loss_sum / max(1.0, all_targets)


def _loss_sum(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """() fp64: the summed loss of a micro-batch."""
    fetched = trainer.rows_for_evaluation(batch)
    moved = batch.to(trainer.device)
    loss, _ = trainer.model(
        moved.input_ids_BL,
        moved.targets_BL,
        moved.seq_idx_BL,
        memory_of(fetched),
    )
    return loss.double()


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
