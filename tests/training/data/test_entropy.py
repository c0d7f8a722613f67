"""Baseline entropies against counts in dictionaries, pair by pair."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.data.token_files import VOCAB, documents_of, make_files
from training.data import entropy
from training.data.entropy import count_bigrams, validation_entropies
from training.data.files import Split, TokenFiles


def pairs_of(documents):
    return [pair for document in documents for pair in itertools.pairwise(document)]


def naive_entropies(files: TokenFiles):
    """The entropies by the formulas of the module's docstring, with counts in dictionaries."""
    train = pairs_of(documents_of(files.train))
    words = Counter(w for _, w in train)
    pairs = Counter(train)
    heads = Counter(h for h, _ in train)
    followers = defaultdict(set)
    for head, word in train:
        followers[head].add(word)

    def unigram(word):
        return (words[word] + 1) / (len(train) + files.vocab_size)

    def bigram(head, word):
        distinct = len(followers[head])
        if not distinct:
            return unigram(word)
        return (pairs[head, word] + distinct * unigram(word)) / (heads[head] + distinct)

    targets = pairs_of(documents_of(files.val))
    return (
        -sum(math.log(unigram(word)) for _, word in targets) / len(targets),
        -sum(math.log(bigram(*pair)) for pair in targets) / len(targets),
        len(targets),
    )


def small_files(train_lengths, val_lengths, vocab=11):
    files = make_files(train_lengths, val_lengths)
    for split in (files.train, files.val):
        split.tokens[:] %= vocab
    return TokenFiles(
        files.path,
        {},
        files.train,
        files.val,
        vocab_size=vocab,
        eod_id=0,
        pad_id=1,
    )


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(
    LENGTHS,
    LENGTHS,
    st.integers(1, 50),
    st.integers(1, 7),
)
def test_entropies_equal_the_formulas(train_lengths, val_lengths, seq_length, chunk):
    files = small_files(train_lengths, val_lengths)
    if not pairs_of(documents_of(files.val)) or len(files.val.tokens) < 2:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "CHUNK", chunk)
        got = validation_entropies(files, seq_length)
    assert (got.unigram, got.bigram, got.num_targets) == pytest.approx(
        naive_entropies(files), rel=1e-12
    )


def test_probabilities_sum_to_one():
    """Over all words after a given one, exp(-entropy) of single-pair validation texts."""
    train = [1, 2, 1, 2, 1, 3, 2, 0]
    vocab = 5
    for head in range(vocab):
        totals = np.zeros(2)
        for word in range(vocab):
            splits = [
                Split(np.array(tokens, dtype=np.uint16), np.array([len(tokens)]), 1)
                for tokens in (train, [head, word])
            ]
            got = validation_entropies(
                TokenFiles(
                    None,
                    {},
                    *splits,
                    vocab_size=vocab,
                    eod_id=0,
                    pad_id=1,
                ),
                4,
            )
            totals += math.exp(-got.unigram), math.exp(-got.bigram)
        assert totals == pytest.approx([1, 1], rel=1e-12)


def test_only_the_rows_of_the_evaluation_count():
    files = small_files([30, 20], [9, 9, 9])
    assert validation_entropies(files, 8, num_rows=1).num_targets == 8
    whole = validation_entropies(files, 8)
    assert validation_entropies(files, 8, num_rows=1000) == whole
    assert whole.num_targets == 24


def test_training_tokens_are_bounded():
    split = make_files([10, 10, 10]).train
    pairs, counts = count_bigrams(split, VOCAB, 15)
    assert sorted(zip(*np.divmod(pairs, VOCAB), strict=True)) == sorted(
        {(h, w) for h, w in pairs_of([split.tokens[:10].tolist(), split.tokens[10:15].tolist()])}
    )
    assert counts.sum() == 13


def test_training_split_of_one_token_leaves_the_uniform_model():
    got = validation_entropies(small_files([1], [6]), 4)
    assert got.unigram == got.bigram == pytest.approx(math.log(11))
