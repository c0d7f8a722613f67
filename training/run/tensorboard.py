"""TensorBoard's view of a run. It may be missing or fail: training does not notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


class Board:
    """Scalars for TensorBoard, where it is installed and as long as it can write."""

    def __init__(
        self, directory: Path, purge_step: int | None, tell: Callable[[str], None]
    ) -> None:
        """Begin to write.

        Args:
            purge_step: the step from which on an interrupted run's scalars are hidden; None for a
                new run.
            tell: told, once, why there are no scalars from now on.
        """
        self._tell = tell
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        except Exception as error:
            self._give_up(error)

    def add(self, name: str, value: float, step: int) -> None:
        """One scalar of a step."""
        if self._writer is None:
            return
        try:
            self._writer.add_scalar(name, value, step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is left and close the file."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self._tell(
            f"TensorBoard writes no scalars ({type(error).__name__}: {error}); metrics.jsonl has "
            "all of them"
        )
