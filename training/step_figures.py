"""What ranks tell one another of a step: one sum over world, which the device makes and the host
reads once, when it is there.

The host goes on meanwhile: the norm, the clipping factor and the experts' loads are used on the
device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parallel.collectives import gather_objects, sum_in_place
from parallel.device import Elapsed, HostCopy, to_device
from parallel.errors import RunError
from parallel.mesh import Mesh
from parallel.placement import PlacedParameter, placed_parameters
from training.model.moe import largest_load
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
    votes: tuple[int, ...] = ()
    """Sums over all ranks of what each said beside its figures."""


class StepSums:
    """The sums over world of one step, in one vector on the device: fp64, in which counts are
    exact.

    Attributes:
        loss: () sum of the cross-entropies of the step's targets.
        grad_norm: () global norm of the gradient, table rows included.
        hot: (2,) table rows that were hot, and all that were asked for.
        votes: (V,) what ranks said beside their figures.
        loads: (layers, E) rows that each expert was wanted for; None without experts.
    """

    def __init__(
        self,
        mesh: Mesh,
        loss: torch.Tensor,
        squares: torch.Tensor,
        hot: tuple[int, int],
        votes: Sequence[int],
        loads: torch.Tensor | None,
    ) -> None:
        """Sum what each rank has. Collective over world.

        Args:
            loss: () of this rank's targets, the same on all tensor ranks.
            squares: (n,) of this rank's share of the squared gradient norm.
            hot, votes: of this rank, in host memory.
            loads: (layers, E) int64 of this rank.
        """
        # Ranks that have the same targets have the same loss: each brings its share of it.
        share = mesh.size("loss") / mesh.size("world")
        counts = to_device(torch.tensor([*hot, *votes], dtype=torch.float64), loss.device)
        figures = torch.stack([loss.double() * share, squares.double().sum()])
        parts = [figures, counts]
        if loads is not None:
            parts.append(loads.double().flatten())
        self.vector = torch.cat(parts)
        sum_in_place(self.vector, mesh.group("world"))
        sizes = [2, 2, len(votes), 0 if loads is None else loads.numel()]
        sums, self.hot, self.votes, counted = self.vector.split(sizes)
        self.loss = sums[0]
        self.grad_norm = sums[1].sqrt()
        self.loads = None if loads is None else counted.view_as(loads)

    def clip_factor(self, clip_norm: float) -> torch.Tensor:
        """() fp64: what gradients are multiplied by; NaN where a loss or gradient is not finite.

        Args:
            clip_norm: largest norm; 0 for any.
        """
        is_finite = torch.isfinite(self.loss) & torch.isfinite(self.grad_norm)
        factor = torch.ones_like(self.grad_norm)
        if clip_norm:
            factor = (clip_norm / (self.grad_norm + 1e-6)).clamp_max(1.0)
        return torch.where(is_finite, factor, math.nan)


@dataclass(frozen=True)
class Waits:
    """What this rank spent on other things than its model in one step."""

    engram_wait_s: float | None
    engram_work_s: float | None
    exchange: Elapsed


class StepFigures:
    """The figures of a step that has been queued, on their way to the host."""

    def __init__(
        self,
        trainer: Trainer,
        step: int,
        sums: StepSums,
        num_targets: torch.Tensor,
        squares: "GradSquares",
        waits: Waits,
    ) -> None:
        """Begin to copy ``sums`` and ``num_targets`` ()."""
        self._trainer = trainer
        self._step = step
        self._squares = squares
        self._waits = waits
        self._num_votes = len(sums.votes)
        self._loads_shape = None if sums.loads is None else sums.loads.shape
        figures = [num_targets.double(), sums.grad_norm]
        self._copy = HostCopy(torch.cat([torch.stack(figures), sums.vector]))

    def read(self) -> StepResult:
        """The figures, once they are there.

        Raises:
            RunError: on every rank: the loss or a gradient is not finite; nothing was updated.
        """
        head, hot_use, votes, loads = self._copy.read().split(self._sizes())
        num_targets, grad_norm, loss_sum, _ = head.tolist()
        loss = loss_sum / max(1.0, num_targets)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RunError(self._not_finite(loss, grad_norm))
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            expert_max=self._expert_max(loads),
            engram_wait_s=self._waits.engram_wait_s,
            engram_work_s=self._waits.engram_work_s,
            exchange_s=self._waits.exchange.seconds(),
            num_targets=int(num_targets),
            engram_hot_hits=self._hot_hits(*hot_use.tolist()),
            votes=tuple(map(int, votes.tolist())),
        )

    def _sizes(self) -> list[int]:
        num_loads = 0 if self._loads_shape is None else self._loads_shape.numel()
        return [4, 2, self._num_votes, num_loads]

    def _expert_max(self, loads: torch.Tensor) -> float | None:
        return None if self._loads_shape is None else largest_load(loads.view(self._loads_shape))

    def _hot_hits(self, hot: float, asked: float) -> float | None:
        return hot / asked if asked and self._trainer.config.table.hot_rows else None

    def _not_finite(self, loss: float, grad_norm: float) -> str:
        """What to tell, with the first rank and parameter that is not finite. Collective over
        world.
        """
        bad = self._squares.first_not_finite(self._trainer)
        found = gather_objects(bad, self._trainer.mesh.group("world"))
        where = next(
            (f"rank {rank}, gradient of {name}" for rank, name in enumerate(found) if name),
            "an Engram table row",
        )
        return (
            f"step {self._step}: loss {loss}, gradient norm {grad_norm}: not finite, first on "
            f"{where}. Nothing was updated; resume from the last checkpoint with a lower "
            "optimizer.learning_rate or train.dtype=fp32."
        )


@dataclass(frozen=True)
class GradSquares:
    """Shares of the squared gradient norm, of each parameter that this rank has gradients of."""

    parameters: list[PlacedParameter]
    values: torch.Tensor
    """(n,) on the device."""

    def first_not_finite(self, trainer: Trainer) -> str | None:
        """Name of the first parameter whose gradient is not finite on this rank."""
        names = {id(parameter): name for name, parameter in placed_parameters(trainer.model)}
        for parameter, square in zip(self.parameters, self.values.tolist(), strict=True):
            if not math.isfinite(square):
                return names[id(parameter)]
        return None
