"""Validation loss: the mean cross-entropy over the first rows of the validation split, the same on every layout."""

import torch
import torch.distributed as dist

from training.data.dataset import ValidationRows
from training.data.loader import load_step
from training.trainer import Trainer, memory_of


@torch.no_grad()
def evaluate(trainer: Trainer, rows: ValidationRows, num_rows: int) -> float:
    """Mean loss in nats a target over ``num_rows`` rows. Collective over world.

    Rows past the end of the split are masked padding, so that every data rank computes equally many batches.
    """
    mesh, micro_batch = trainer.mesh, trainer.config.train.micro_batch
    per_round = micro_batch * mesh.size("dp")
    total = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    for start in range(0, min(num_rows, len(rows)), per_round):
        for batch in load_step(rows, start // per_round, per_round, micro_batch, mesh.rank("dp"), mesh.size("dp")):
            fetched = trainer.fetch(batch)
            moved = batch.to(trainer.device)
            loss, _ = trainer.model(moved.input_ids_BL, moved.targets_BL, moved.seq_idx_BL, memory_of(fetched))
            total += torch.tensor([float(loss), moved.num_targets], dtype=torch.float64, device=trainer.device)
    dist.all_reduce(total, group=mesh.group("dp"))
    return float(total[0] / total[1].clamp_min(1))
