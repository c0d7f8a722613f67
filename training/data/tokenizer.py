"""Tokenizers: a byte-level BPE trained on the corpus, or a given tokenizer.json."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import Problem, RunError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOD = "<|endoftext|>"
PAD = "<|pad|>"
# Names under which published tokenizers know the two; the first that exists counts.
EOD_NAMES = (EOD, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")
PAD_NAMES = (PAD, "<｜▁pad▁｜>", "<pad>", "[PAD]")


def train_tokenizer(texts: Iterable[list[str]], vocab_size: int) -> "Tokenizer":
    """Byte-level BPE with ``<|endoftext|>`` as id 0 and ``<|pad|>`` as id 1; the same bytes for the
    same texts.

    Args:
        texts: batches of documents.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """A tokenizer.json, set to encode whole documents: no truncation, no padding, special tokens'
    names are plain text.

    Raises:
        RunError: the file is missing or holds no tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        reason = "does not exist" if not path.exists() else f"is not a tokenizer: {error}"
        raise RunError(
            Problem(
                field="tokenizer",
                value=path,
                rule=reason,
                fix="name a tokenizer.json",
            )
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that mentions <|endoftext|> must not end there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """Largest token id + 1: ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def special_ids(tokenizer: "Tokenizer") -> tuple[int, int]:
    """Ids that end a document and that pad a row; a tokenizer without padding pads with the former.

    Raises:
        RunError: the tokenizer has no token to end a document.
    """
    eod = next(
        (
            tokenizer.token_to_id(name)
            for name in EOD_NAMES
            if tokenizer.token_to_id(name) is not None
        ),
        None,
    )
    pad = next(
        (
            tokenizer.token_to_id(name)
            for name in PAD_NAMES
            if tokenizer.token_to_id(name) is not None
        ),
        eod,
    )
    if eod is None or pad is None:
        raise RunError(
            Problem(
                field="tokenizer",
                value=f"{vocabulary_size(tokenizer)} tokens",
                rule="has no token that ends a document",
                fix=f"add one of {', '.join(EOD_NAMES)}",
            )
        )
    return eod, pad
