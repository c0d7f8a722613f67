"""Packed rows against a stream written out token by token; steps against the plain list of rows."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import RunError
from training.data.dataset import NO_TARGET, Batch, PackedRows, Row, ValidationRows
from training.data.files import Split, TokenFiles
from training.data.loader import StepLoader, fingerprint, load_step, step_rows
from training.data.order import random_bits, random_order

EOD = 0
PAD = 1
VOCAB = 40_000


def make_split(lengths, unique=False) -> Split:
    """Documents of these lengths, each ended by EOD; ``unique`` gives every token its own id."""
    total = sum(lengths)
    tokens = np.arange(total) if unique else np.random.RandomState(7).randint(2, VOCAB, total)
    ends = np.cumsum(lengths, dtype=np.int64)
    if not unique:
        tokens[ends - 1] = EOD
    return Split(tokens.astype(np.uint16), ends, 4 * total)


def make_files(lengths, val_lengths=(5,), unique=False) -> TokenFiles:
    splits = make_split(lengths, unique), make_split(val_lengths, unique)
    return TokenFiles(
        Path("made/up"),
        {},
        *splits,
        vocab_size=VOCAB,
        eod_id=EOD,
        pad_id=PAD,
    )


def documents_of(split: Split) -> list[list[int]]:
    return [part.tolist() for part in np.split(split.tokens, split.ends[:-1])]


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 5))
def test_each_token_of_an_epoch_is_an_input_once(lengths, seq_length, seed):
    total = sum(lengths)
    if seq_length + 1 > total:
        return
    rows = PackedRows(
        make_files(lengths, unique=True),
        "train",
        seq_length,
        seed,
    )
    # seq_length epochs hold exactly total rows: the stream ends where a row ends.
    counts = np.zeros(total, dtype=np.int64)
    for index in range(total):
        counts += np.bincount(rows.row(index)[:-1], minlength=total)
    assert (counts == seq_length).all()
    first_epoch = -(-total // seq_length)
    inputs = np.bincount(
        np.concatenate([rows.row(i)[:-1] for i in range(first_epoch)]), minlength=total
    )
    assert (inputs >= 1).all()
    assert inputs.sum() - total < seq_length


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 5))
def test_rows_are_cut_from_whole_documents_of_shuffled_epochs(lengths, seq_length, seed):
    """The rows of three epochs, sorted by where they start, are the stream: every document whole,
    once an epoch.
    """
    files = make_files(lengths, unique=True)
    total = sum(lengths)
    if seq_length + 1 > total:
        return
    rows = PackedRows(files, "train", seq_length, seed)
    num_rows = -(-3 * total // seq_length)
    places = [rows._locate(index) for index in range(num_rows)]
    starts = [epoch * total + place for epoch, place in places]
    assert sorted(starts) == list(range(0, num_rows * seq_length, seq_length))
    assert [epoch for epoch, _ in places] == sorted(epoch for epoch, _ in places)
    by_start = [rows.row(index) for index in np.argsort(starts)]
    for row, following in itertools.pairwise(by_start):
        assert row[-1] == following[0]
    stream = np.concatenate([row[:-1] for row in by_start])[: 3 * total].tolist()
    documents = documents_of(files.train)
    for epoch in range(3):
        left = {doc[0]: doc for doc in documents}
        tokens = stream[epoch * total : (epoch + 1) * total]
        while tokens:
            document = left.pop(tokens[0])
            assert tokens[: len(document)] == document
            tokens = tokens[len(document) :]
        assert not left


def test_epochs_documents_and_rows_are_shuffled():
    rows = PackedRows(make_files([10] * 200), "train", 16, seed=0)
    orders = [rows._document_order(epoch)[0].tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(200))
    other = PackedRows(make_files([10] * 200), "train", 16, seed=1)
    assert other._document_order(0)[0].tolist() != orders[0]
    starts = [rows._locate(index)[1] for index in range(125)]
    assert starts != sorted(starts)
    assert starts != [rows._locate(index)[1] for index in range(125, 250)]


def test_any_row_at_any_time():
    files = make_files([3, 50, 1, 1, 20, 7])
    forward = PackedRows(files, "train", 9, seed=3)
    expected = [forward.row(index).tolist() for index in range(60)]
    backward = PackedRows(files, "train", 9, seed=3)
    assert [backward.row(index).tolist() for index in reversed(range(60))] == expected[::-1]


def test_orders_are_those_of_philox_on_every_machine():
    """Golden values: a resumed run on another version of numpy must read on in the same order."""
    assert random_order(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    assert random_bits(2, 0).tolist() == [259491006799949737, 4754966410622352325]
    assert random_bits(9, 4).tolist()[:5] == random_bits(5, 4).tolist()
    assert random_order(0, 1).tolist() == []


def naive_batch(tokens, pad_from=None):
    """Inputs, targets, seq_idx of one row by a loop over its tokens."""
    inputs = []
    targets = []
    seq_idx = []
    document = 0
    pad_from = len(tokens) if pad_from is None else pad_from
    for place in range(len(tokens) - 1):
        if place == pad_from and place > 0 and tokens[place - 1] != EOD:
            document += 1
        inputs.append(tokens[place])
        seq_idx.append(document)
        dead = tokens[place] == EOD or place + 1 >= pad_from
        targets.append(NO_TARGET if dead else tokens[place + 1])
        if tokens[place] == EOD:
            document += 1
    return inputs, targets, seq_idx


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 40))
def test_batch_equals_a_loop_over_tokens(lengths, seq_length):
    if seq_length + 1 > sum(lengths):
        return
    rows = PackedRows(
        make_files(lengths),
        "train",
        seq_length,
        seed=1,
    )
    batch = Batch.stack([rows.read(index) for index in range(12)])
    assert (batch.input_ids_BL.dtype, batch.targets_BL.dtype, batch.seq_idx_BL.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    for index in range(12):
        inputs, targets, seq_idx = naive_batch(rows.row(index).tolist())
        assert batch.input_ids_BL[index].tolist() == inputs
        assert batch.targets_BL[index].tolist() == targets
        assert batch.seq_idx_BL[index].tolist() == seq_idx
    assert batch.num_targets == int((batch.targets_BL != NO_TARGET).sum())
    assert all(
        tensor.is_contiguous()
        for tensor in (batch.input_ids_BL, batch.targets_BL, batch.seq_idx_BL)
    )


def test_boundaries_need_no_end_of_document_token():
    rows = PackedRows(
        make_files([3, 4], unique=True),
        "train",
        6,
        seed=0,
    )
    row = next(row for row in map(rows.read, range(2)) if sorted(row.tokens) == list(range(7)))
    first = 3 if row.tokens[0] == 0 else 4
    assert row.segments.tolist() == [0] * first + [1] * (7 - first)
    assert (Batch.stack([row]).targets_BL[0] == NO_TARGET).nonzero().tolist() == [[first - 1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 40))
def test_validation_is_in_order_once_and_padded(lengths, seq_length):
    files = make_files([5], lengths)
    rows = ValidationRows(files, seq_length)
    tokens = files.val.tokens.tolist()
    assert (len(rows) - 1) * seq_length < len(tokens) - 1 <= len(rows) * seq_length
    seen = 0
    for index in range(len(rows)):
        part = tokens[index * seq_length : (index + 1) * seq_length + 1]
        padded = part + [PAD] * (seq_length + 1 - len(part))
        inputs, targets, seq_idx = naive_batch(padded, pad_from=len(part))
        batch = Batch.stack([rows.read(index)])
        assert batch.input_ids_BL[0].tolist() == inputs
        assert batch.targets_BL[0].tolist() == targets
        assert batch.seq_idx_BL[0].tolist() == seq_idx
        seen += batch.num_targets
    assert seen == len(tokens) - len(lengths)  # every token but each document's first


def test_rows_after_the_last_validation_row_are_padding():
    rows = ValidationRows(make_files([5], [4, 4]), 3)
    batch = Batch.stack([rows.read(len(rows)), rows.read(len(rows) + 100)])
    assert batch.num_targets == 0
    assert (batch.input_ids_BL == PAD).all()
    assert (batch.targets_BL == NO_TARGET).all()
    assert (batch.seq_idx_BL == 0).all()


def test_padding_at_the_end_of_a_row_has_an_index_of_its_own():
    batch = Batch.stack([ValidationRows(make_files([5], [2, 3]), 8).read(0)])
    assert batch.seq_idx_BL.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]


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


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (
            lambda files: PackedRows(files, "train", 9),
            "data.seq_length=9 is longer than the 9 tokens",
        ),
        (lambda files: PackedRows(files, "train", 0), "data.seq_length=0 is below 1"),
        (lambda files: PackedRows(files, "train", 4, seed=-1), "data.seed=-1 is negative"),
        (lambda files: ValidationRows(files, 0), "data.seq_length=0 is below 1"),
        (lambda files: ValidationRows(files, 4), "data.path=made/up has one token"),
    ],
)
def test_rows_that_cannot_be_are_errors_for_the_user(make, field):
    with pytest.raises(RunError, match=field):
        make(make_files([4, 5], [1]))


def test_the_longest_row_is_one_token_short_of_the_split():
    rows = PackedRows(
        make_files([4, 5], unique=True),
        "train",
        8,
        seed=0,
    )
    assert any(sorted(rows.row(index)) == list(range(9)) for index in range(2))
