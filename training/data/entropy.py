"""What a model must beat: cross-entropy of unigram and bigram models on the validation targets.

Legend: B batch, L length, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from training.data.dataset import NO_TARGET, Batch, ValidationRows
from training.data.files import Split, TokenFiles

# Tokens that are counted at once.
CHUNK = 2**22
# Bounds the distinct bigrams, hence memory: at most 16 bytes each, in a few copies.
MAX_TRAIN_TOKENS = 2**26


@dataclass(frozen=True)
class Entropies:
    """Cross-entropies in nats a token, and the number of targets they are means of."""

    unigram: float
    bigram: float
    num_targets: int


def validation_entropies(
    files: TokenFiles,
    seq_length: int,
    num_rows: int | None = None,
    max_train_tokens: int = MAX_TRAIN_TOKENS,
) -> Entropies:
    """Cross-entropies on the targets of the first ``num_rows`` validation rows (all by default),
    fitted on train.

    Counts c are of tokens (w after h) that follow another of their document, as the loss's targets
    do, among the first ``max_train_tokens`` of the split; N is their sum, V the vocabulary, t(h)
    the number of distinct tokens seen after h. Unigram: add-one, p(w) = (c(w) + 1) / (N + V).
    Bigram: Witten-Bell interpolation with it, p(w | h) = (c(h, w) + t(h) p(w)) / (c(h) + t(h)), and
    p(w) where h was never followed. Both are never zero.
    """
    pairs, counts = count_bigrams(files.train, files.vocab_size, max_train_tokens)
    heads, words = np.divmod(pairs, files.vocab_size)
    word_counts = np.bincount(words, weights=counts, minlength=files.vocab_size)
    head_counts = np.bincount(heads, weights=counts, minlength=files.vocab_size)
    num_followers = np.bincount(heads, minlength=files.vocab_size)
    unigram = (word_counts + 1) / (word_counts.sum() + files.vocab_size)
    sums = np.zeros(2)
    num_targets = 0
    for head, word in _validation_pairs(files, seq_length, num_rows):
        seen = _look_up(pairs, counts, head * files.vocab_size + word)
        total = head_counts[head] + num_followers[head]
        interpolated = (seen + num_followers[head] * unigram[word]) / np.maximum(total, 1)
        bigram = np.where(total > 0, interpolated, unigram[word])
        sums[0] -= np.log(unigram[word]).sum()
        sums[1] -= np.log(bigram).sum()
        num_targets += len(word)
    unigram_mean, bigram_mean = (sums / max(num_targets, 1)).tolist()
    return Entropies(unigram_mean, bigram_mean, num_targets)


def count_bigrams(split: Split, vocab_size: int, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted int64 keys h V + w of the bigrams inside documents,
    and how often each occurs (int64).
    """
    num_tokens = min(max_tokens, len(split.tokens))
    pairs = np.empty(0, dtype=np.int64)
    counts = np.empty(0, dtype=np.int64)
    for start in range(0, num_tokens - 1, CHUNK):
        # One token more than a chunk: the last bigram's second.
        stop = min(start + CHUNK + 1, num_tokens)
        tokens = split.tokens[start:stop].astype(np.int64)
        first, last = np.searchsorted(split.ends, (start + 1, start + len(tokens)))
        begins_document = np.zeros(len(tokens), dtype=bool)
        begins_document[split.ends[first:last] - start] = True
        keys = tokens[:-1] * vocab_size + tokens[1:]
        chunk, chunk_counts = np.unique(keys[~begins_document[1:]], return_counts=True)
        pairs, places = np.unique(np.concatenate((pairs, chunk)), return_inverse=True)
        both = np.concatenate((counts, chunk_counts))
        counts = np.bincount(places, weights=both, minlength=len(pairs)).astype(np.int64)
    return pairs, counts


def _look_up(pairs: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    if not len(pairs):
        return np.zeros(len(wanted), dtype=np.int64)
    places = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    return np.where(pairs[places] == wanted, counts[places], 0)


def _validation_pairs(
    files: TokenFiles, seq_length: int, num_rows: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets) of each row, where there is a target."""
    rows = ValidationRows(files, seq_length)
    count = len(rows) if num_rows is None else min(num_rows, len(rows))
    for index in range(count):
        batch = Batch.stack([rows.read(index)])
        inputs = batch.input_ids_BL.numpy()[0]
        targets = batch.targets_BL.numpy()[0]
        has_target = targets != NO_TARGET
        yield inputs[has_target], targets[has_target]
