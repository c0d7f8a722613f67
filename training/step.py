"""One optimizer step over the rank's micro-batches: forward, backward, norm, clip, update.

Nothing here waits for the device, but for the gradients of Engram rows, which are at home in host
memory: a step is queued, and its figures are read when they are there.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from parallel.collectives import sum_in_place
from parallel.device import HostCopy, to_device
from parallel.experts import take_exchange_time
from parallel.placement import squared_norm
from training.data.dataset import Batch
from training.engram.memory import memory_of
from training.model.moe import expert_loads, update_balance
from training.step_figures import GradSquares, StepFigures, StepResult, StepSums, Waits
from training.trainer import Trainer


def train_step(
    trainer: Trainer,
    batches: list[Batch],
    learning_rate: float,
    step: int,
    upcoming: Callable[[], list[Batch]] = list,
) -> StepResult:
    """Accumulate the micro-batches' gradients, clip them by the global norm, update parameters and
    table rows; wait for the figures.

    Args:
        upcoming: the micro-batches of the next step, none after the last: their table rows are
            prefetched.

    Raises:
        RunError: a loss or gradient is not finite; nothing has been updated.
    """
    begun = BegunStep(trainer, batches, upcoming)
    return begun.finish(learning_rate, step).read()


class BegunStep:
    """A step whose first micro-batch has been queued."""

    def __init__(
        self,
        trainer: Trainer,
        batches: list[Batch],
        upcoming: Callable[[], list[Batch]] = list,
    ) -> None:
        """Queue the first micro-batch; ``upcoming`` as ``train_step``'s."""
        self._trainer = trainer
        self._batches = batches
        self._upcoming = upcoming
        self._seconds = engram_seconds(trainer)
        self._num_targets = _global_targets(trainer, batches)
        # The engine divides gradients by micro-batches and by the ranks that it sums them over.
        ranks = trainer.mesh.size("grad")
        self._scale = (len(batches) * ranks / self._num_targets.clamp_min(1).double()).float()
        self._loss_sum = torch.zeros((), device=trainer.device)
        self._loads: torch.Tensor | None = None
        self._add(0)

    def finish(
        self,
        learning_rate: float,
        step: int,
        votes: Callable[[], Sequence[int]] = tuple,
    ) -> StepFigures:
        """Queue the other micro-batches and the update. Collective over world.

        Where a loss or gradient is not finite, which the figures tell, nothing is updated.

        Args:
            votes: gives counts of this rank that are summed with the figures; asked late.
        """
        trainer = self._trainer
        for index in range(1, len(self._batches)):
            trainer.engine.end_micro_batch()
            self._add(index)
        squares = dense_grad_squares(trainer)
        sums = self._sums(squares.values, votes())
        factor = sums.clip_factor(trainer.config.optimizer.clip_norm)
        if trainer.memory is not None:
            on_host = HostCopy(factor)
            trainer.memory.tables.step(learning_rate, on_host.value, step)
        trainer.engine.finish_step(factor.float(), learning_rate)
        if sums.loads is not None:
            update_balance(trainer.model, sums.loads, ~factor.isnan())
        return StepFigures(trainer, step, sums, self._num_targets, squares, self._waits())

    def _add(self, index: int) -> None:
        """Queue one micro-batch."""
        coming = partial(following, self._batches[index + 1 :], self._upcoming)
        trainer = self._trainer
        self._loss_sum += _add_gradients(trainer, self._batches[index], self._scale, coming)
        loads = expert_loads(trainer.model)
        if loads is not None:
            self._loads = loads if self._loads is None else self._loads + loads

    def _sums(self, squares: torch.Tensor, votes: Sequence[int]) -> StepSums:
        hot = (0, 0)
        tables = self._trainer.memory and self._trainer.memory.tables
        if tables:
            squares = torch.cat([squares, tables.squared_grad_norm().to(squares)[None]])
            hot = tables.hot_use
        return StepSums(self._trainer.mesh, self._loss_sum, squares, hot, votes, self._loads)

    def _waits(self) -> Waits:
        exchange = take_exchange_time(self._trainer.model)
        if self._trainer.memory is None:
            return Waits(None, None, exchange)
        waited, worked = self._seconds
        now_waited, now_worked = engram_seconds(self._trainer)
        return Waits(now_waited - waited, now_worked - worked, exchange)


def _add_gradients(
    trainer: Trainer,
    batch: Batch,
    scale: torch.Tensor,
    coming: Callable[[int], list[Batch]],
) -> torch.Tensor:
    """Forward and backward of one micro-batch, table rows included; its sum of cross-entropies.

    Args:
        scale: () what the loss is multiplied by before the backward.
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


def dense_grad_squares(trainer: Trainer) -> GradSquares:
    """This rank's share of the squared norm of the model's gradient, table rows excluded: each
    global element counts once over all ranks.
    """
    parameters = []
    squares = []
    for parameter, start, values in trainer.engine.gradient_fragments():
        parameters.append(parameter)
        squares.append(squared_norm(parameter, start, values, trainer.mesh))
    values = torch.stack(squares) if squares else torch.zeros(0, device=trainer.device)
    return GradSquares(parameters, values)


def _global_targets(trainer: Trainer, batches: list[Batch]) -> torch.Tensor:
    """() int64: targets of the step over all data ranks. The loss is a mean over them, not a mean
    of means.
    """
    mine = torch.tensor(sum(batch.num_targets for batch in batches))
    count = to_device(mine, trainer.device)
    sum_in_place(count, trainer.mesh.group("loss"))
    return count
