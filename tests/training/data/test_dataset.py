"""Packed rows against a stream written out token by token."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import RunError
from tests.training.data.token_files import EOD, PAD, documents_of, make_files
from training.data.dataset import NO_TARGET, Batch, PackedRows, ValidationRows

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
