"""Steps against the plain list of rows, whoever reads them and wherever a run goes on."""

import itertools
import threading

import numpy as np
import pytest
import torch

from tests.training.data.token_files import make_files
from training.data.dataset import Batch, PackedRows, Row
from training.data.loader import StepLoader, fingerprint, load_step, step_rows


@pytest.mark.parametrize(
    ("num_ranks", "micro_batch"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1), (2, 1)]
)
def test_the_rows_of_a_step_do_not_depend_on_ranks(num_ranks, micro_batch):
    for step in (0, 1, 7):
        shares = [
            step_rows(12 * step, 12, micro_batch, rank, num_ranks) for rank in range(num_ranks)
        ]
        assert all(
            share.shape == (12 // (micro_batch * num_ranks), micro_batch) for share in shares
        )
        assert sorted(np.concatenate(shares, axis=None)) == list(range(12 * step, 12 * step + 12))


def test_rows_are_assigned_as_by_megatrons_sampler():
    shares = [step_rows(8, 8, 2, rank, 2).tolist() for rank in range(2)]
    assert shares == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in ("input_ids_BL", "targets_BL", "seq_idx_BL")
    )


def test_step_holds_its_rows():
    rows = PackedRows(make_files([9, 30, 4, 16]), "train", 7, seed=2)
    batches = load_step(rows, 24, 8, 2, rank=1, num_ranks=2)
    got = torch.cat([batch.input_ids_BL for batch in batches]).tolist()
    assert got == [rows.row(index)[:-1].tolist() for index in (26, 27, 30, 31)]


def test_resumed_loader_reads_on():
    def rows():
        return PackedRows(make_files([9, 30, 4, 16]), "train", 7, seed=2)

    with StepLoader(rows(), 0, 4, 2, 1, 2) as loader:
        uninterrupted = list(itertools.islice(loader, 12))
        assert loader.row == 48
    with StepLoader(rows(), 20, 4, 2, 1, 2) as resumed:
        assert all(same(next(resumed), expected) for expected in uninterrupted[5:])
    assert not same(uninterrupted[0], uninterrupted[1])


@pytest.mark.parametrize("batches", [(4, 8), (8, 4), (4, 12, 2), (6, 3, 3, 12)])
def test_another_batch_reads_on_where_the_last_one_ended(batches):
    """Each row once and in order, wherever the batch changes; what is peeked at is what comes."""
    read = []
    first_row = 0
    for batch in batches:
        with StepLoader(BrokenRows(broken=None), first_row, batch, 1) as loader:
            for _ in range(3):
                coming = loader.peek()
                step = next(loader)
                assert step is coming
                read += [int(micro.input_ids_BL[0, 0]) for micro in step]
            first_row = loader.row
    assert read == list(range(3 * sum(batches)))


class BrokenRows:
    """Raises in row ``broken``; remembers which threads read."""

    seq_length = 4

    def __init__(self, broken=6):
        self.threads = set()
        self.broken = broken

    def read(self, index):
        self.threads.add(threading.current_thread())
        if index == self.broken:
            raise OSError("disk gone")
        return Row(np.full(5, index), np.zeros(5, dtype=np.int32), 5)


def test_loader_raises_what_its_thread_raised_at_that_step():
    rows = BrokenRows()
    with StepLoader(rows, 0, 2, 2) as loader:
        for step in range(3):
            assert next(loader)[0].input_ids_BL[:, 0].tolist() == [2 * step, 2 * step + 1]
        for _ in range(2):
            with pytest.raises(OSError, match="disk gone"):
                next(loader)
    assert threading.main_thread() not in rows.threads
    assert not any(thread.is_alive() for thread in rows.threads)


def test_fingerprint_tells_orders_apart():
    lengths = [9, 30, 4, 16]

    def of(lengths=lengths, seq_length=7, seed=0, n=20):
        return fingerprint(PackedRows(make_files(lengths), "train", seq_length, seed), n)

    assert of() == of()
    others = {of(seed=1), of(seq_length=8), of(n=21), of(lengths=[30, 9, 4, 16]), of()}
    assert len(others) == 5


@pytest.mark.parametrize(
    "arguments", [(0, 6, 4, 0, 1), (0, 0, 1, 0, 1), (0, 4, 2, 2, 2), (0, 4, 2, -1, 2)]
)
def test_batches_that_do_not_divide_are_errors(arguments):
    with pytest.raises(ValueError, match=r"global_batch|rank"):
        step_rows(*arguments)
    with pytest.raises(ValueError, match=r"global_batch|rank"):
        StepLoader(BrokenRows(), *arguments)
