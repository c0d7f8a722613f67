"""One optimizer step over the rank's micro-batches: forward, backward, norm, clip, update."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from parallel.collectives import gather_objects, sum_in_place
from parallel.errors import RunError
from parallel.experts import take_exchange_seconds
from parallel.placement import placed_parameters
from training.data.dataset import Batch
from training.engram.memory import memory_of
from training.model.moe import expert_loads, update_balance
from training.trainer import Trainer


@dataclass(frozen=True)
class StepResult:
    """Figures of one step, the same on every rank except the waiting time."""

    loss: float
    """Mean cross-entropy of the step's targets, nats."""
    grad_norm: float
    """Global norm before clipping, Engram rows included."""
    expert_max: float | None
    """Largest expert load / mean, over the MoE layers."""
    engram_wait_s: float | None
    """Seconds that this rank's step stood still for Engram rows."""
    engram_work_s: float | None
    """Seconds of hashing, fetching, returning and updating Engram rows,
    in the background or not.
    """
    exchange_s: float
    """Seconds that this rank spent in the all-to-all of expert rows, waiting included."""
    num_targets: int | None = None
    """Targets of the step, over all ranks."""
    engram_hot_hits: float | None = None
    """Share of the distinct rows of micro-batches that their owners had among their hot rows, over
    all ranks.
    """


def train_step(
    trainer: Trainer,
    batches: list[Batch],
    learning_rate: float,
    step: int,
    upcoming: Callable[[], list[Batch]] = list,
) -> StepResult:
    """Accumulate the micro-batches' gradients, clip them by the global norm, update parameters and
    table rows.

    Args:
        upcoming: the micro-batches of the next step, none after the last: their table rows are
            prefetched.

    Raises:
        RunError: a loss or gradient is not finite; nothing has been updated.
    """
    memory = trainer.memory
    num_targets = _global_targets(trainer, batches)
    # The engine divides gradients by micro-batches and by the ranks that it sums them over.
    scale = len(batches) * trainer.mesh.size("grad") / max(1, num_targets)
    loss_sum = torch.zeros((), device=trainer.device)
    loads = None
    waited, worked = engram_seconds(trainer)
    for index, batch in enumerate(batches):
        coming = partial(following, batches[index + 1 :], upcoming)
        loss_sum += _add_gradients(trainer, batch, scale, coming)
        counted = expert_loads(trainer.model)
        if counted is not None:
            loads = counted if loads is None else loads + counted
        if index < len(batches) - 1:
            trainer.engine.end_micro_batch()
    grad_norm, hot_hits = global_grad_norm(trainer)
    loss = _mean_loss(trainer, loss_sum, scale / len(batches))
    _require_finite(trainer, loss, grad_norm, step)
    clip = trainer.config.optimizer.clip_norm
    factor = min(1.0, clip / (grad_norm + 1e-6)) if clip else 1.0
    if memory is not None:
        memory.tables.step(learning_rate, factor, step)
    trainer.engine.finish_step(factor, learning_rate)
    expert_max = None
    if loads is not None:
        expert_max = float(update_balance(trainer.model, loads, trainer.mesh))
    now_waited, now_worked = engram_seconds(trainer)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        expert_max=expert_max,
        engram_wait_s=now_waited - waited if memory else None,
        engram_work_s=now_worked - worked if memory else None,
        exchange_s=take_exchange_seconds(trainer.model),
        num_targets=num_targets,
        engram_hot_hits=hot_hits,
    )


def _add_gradients(
    trainer: Trainer,
    batch: Batch,
    scale: float,
    coming: Callable[[int], list[Batch]],
) -> torch.Tensor:
    """Forward and backward of one micro-batch, table rows included; its sum of cross-entropies.

    Args:
        scale: what the loss is multiplied by before the backward.
        coming: the next n micro-batches, whose table rows begin to move.
    """
    rows = trainer.rows_for_training(batch, coming)
    moved = batch.to(trainer.device)
    cross_entropy, auxiliary = trainer.engine.forward(
        moved.input_ids_BL,
        moved.targets_BL,
        moved.seq_idx_BL,
        memory_of(rows),
    )
    trainer.engine.backward((cross_entropy + auxiliary) * scale)
    if trainer.memory is not None:
        share = 1 / trainer.mesh.size("grad")
        trainer.memory.tables.accumulate(rows, scale=share)
    return cross_entropy.detach()


def following(rest: list[Batch], upcoming: Callable[[], list[Batch]], n: int) -> list[Batch]:
    """The next ``n`` micro-batches: those left of this step, then of the next one, which is asked
    only if needed.
    """
    return (rest if len(rest) >= n else rest + upcoming())[:n]


def engram_seconds(trainer: Trainer) -> tuple[float, float]:
    """Seconds that this process has waited for table rows, and that their work took, since it
    began.
    """
    if trainer.memory is None:
        return 0.0, 0.0
    worker = trainer.memory.tables.worker
    return worker.waited_s, worker.worked_s


def global_grad_norm(trainer: Trainer) -> tuple[float, float | None]:
    """Norm of the whole model's gradient, table rows included, each global element once.

    With it, in one all-reduce over world, the share of the table rows asked for that were hot; None
    where none were asked for or none are kept.
    """
    squared = trainer.engine.squared_grad_norm()
    hot_use = (0, 0)
    if trainer.memory is not None:
        squared = squared + trainer.memory.tables.squared_grad_norm().to(squared)
        hot_use = trainer.memory.tables.hot_use
    sums = torch.stack([squared, *squared.new_tensor(hot_use)])
    sum_in_place(sums, trainer.mesh.group("world"))
    sums[0].sqrt_()
    norm, hot, asked = sums.tolist()
    return norm, hot / asked if asked and trainer.config.table.hot_rows else None


def _global_targets(trainer: Trainer, batches: list[Batch]) -> int:
    """Targets of the step over all data ranks: the loss is a mean over them,
    not a mean of means.
    """
    count = torch.tensor(sum(batch.num_targets for batch in batches), device=trainer.device)
    sum_in_place(count, trainer.mesh.group("loss"))
    return int(count)


def _mean_loss(trainer: Trainer, loss_sum: torch.Tensor, scale: float) -> float:
    """Mean over the step's targets; ``scale`` is (ranks of ``grad``) / targets."""
    sum_in_place(loss_sum, trainer.mesh.group("loss"))
    return float(loss_sum) * scale / trainer.mesh.size("grad")


def _require_finite(trainer: Trainer, loss: float, grad_norm: float, step: int) -> None:
    """Stop on every rank, before anything is updated, naming the first rank and parameter that is
    not finite.
    """
    if torch.isfinite(torch.tensor([loss, grad_norm])).all():
        return
    names = {id(parameter): name for name, parameter in placed_parameters(trainer.model)}
    bad = next(
        (
            names[id(fragment.parameter)]
            for fragment in trainer.engine.gradient_fragments()
            if not torch.isfinite(fragment.values).all()
        ),
        None,
    )
    found = gather_objects(bad, trainer.mesh.group("world"))
    where = next(
        (f"rank {rank}, gradient of {name}" for rank, name in enumerate(found) if name),
        "an Engram table row",
    )
    raise RunError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, first on {where}. "
        "Nothing was updated; "
        "resume from the last checkpoint with a lower optimizer.learning_rate or train.dtype=fp32."
    )
