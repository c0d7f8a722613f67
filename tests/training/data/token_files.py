"""Token files of made-up documents, in memory."""

from pathlib import Path

import numpy as np

from training.data.files import Split, TokenFiles

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
    """Token files of documents of these lengths."""
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
    """The token ids of each document."""
    return [part.tolist() for part in np.split(split.tokens, split.ends[:-1])]
