"""Which rows a rank computes in a step: the next ``global_batch`` of them after those that were
consumed before.

The position in the data is a number of rows, not of steps: a run may go on with another global
batch.
"""

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from training.data.dataset import Batch, Rows


def step_rows(
    first_row: int, global_batch: int, micro_batch: int, rank: int, num_ranks: int
) -> np.ndarray:
    """(micro-batches, micro_batch) int64 numbers of the rows that ``rank`` computes of a step from
    ``first_row`` on.

    As Megatron's sampler: micro-batch m takes the m-th run of micro_batch x num_ranks rows of the
    step, and rank r the r-th share of it.

    Raises:
        ValueError: the batch does not divide, or the rank is not one.
    """
    if global_batch < 1 or micro_batch < 1 or global_batch % (micro_batch * num_ranks):
        raise ValueError(
            f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch} x "
            f"num_ranks={num_ranks}"
        )
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank={rank} is not one of num_ranks={num_ranks}")
    rows = first_row + np.arange(global_batch, dtype=np.int64)
    return rows.reshape(-1, num_ranks, micro_batch)[:, rank]


def load_step(
    rows: Rows,
    first_row: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[Batch]:
    """The micro-batches of ``rank`` in the step whose rows begin at number ``first_row`` of
    ``rows``.

    Raises:
        ValueError: as step_rows.
    """
    numbers = step_rows(
        first_row,
        global_batch,
        micro_batch,
        rank,
        num_ranks,
    )
    return [
        Batch.stack([rows.read(number) for number in numbers_B]) for numbers_B in numbers.tolist()
    ]


class StepLoader:
    """Iterates over steps without end and reads two ahead on a thread; what that raises is raised
    by ``next``.
    """

    def __init__(
        self,
        rows: Rows,
        first_row: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Begin to read at ``first_row``: the only state that a resumed run needs.

        Raises:
            ValueError: as step_rows.
        """
        step_rows(
            first_row,
            global_batch,
            micro_batch,
            rank,
            num_ranks,
        )
        self.row = first_row
        self._global_batch = global_batch
        self._arguments = (global_batch, micro_batch, rank, num_ranks)
        self._rows = rows
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader")
        self._ahead = deque([self._submit(first_row), self._submit(first_row + global_batch)])

    def __iter__(self) -> "StepLoader":
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next step. ``self.row`` then says how many rows all steps have
        consumed.
        """
        batches = self._ahead[0].result()  # an error stays, for the next call too
        self._ahead.popleft()
        self.row += self._global_batch
        self._ahead.append(self._submit(self.row + self._global_batch))
        return batches

    def peek(self) -> list[Batch]:
        """The very micro-batches that ``next`` will give."""
        return self._ahead[0].result()

    def __enter__(self) -> "StepLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and end the thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _submit(self, first_row: int) -> Future[list[Batch]]:
        return self._reader.submit(
            load_step,
            self._rows,
            first_row,
            *self._arguments,
        )


def fingerprint(rows: Rows, n: int = 1000) -> str:
    """sha256 of the tokens and document boundaries of the first ``n`` rows: equal when a resumed
    run reads the same.
    """
    digest = hashlib.sha256(f"{rows.seq_length} {n}".encode())
    for index in range(n):
        row = rows.read(index)
        digest.update(row.tokens.astype("<i8").tobytes())
        digest.update(row.segments.astype("<i4").tobytes())
    return digest.hexdigest()
