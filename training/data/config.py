"""Which data is prepared, and which is read. No torch in here: the CLI imports it."""

from dataclasses import dataclass
from typing import Annotated

from parallel.errors import Problem
from parallel.ranges import Count, Natural, Range, range_problems, untold

SMALLEST_VOCABULARY = 258  # 256 bytes and two special tokens


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens are read, and in what rows."""

    path: str = "data/stdlib"
    """Directory written by `prepare`: token files, tokenizer and token map."""
    seq_length: Count = 512
    """L, tokens of a packed row."""
    seed: Natural = 0
    """Seed of the order of documents and rows."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From documents to token files."""

    source: tuple[str, ...] = ("stdlib",)
    """One or several of: `stdlib` (the source of this Python's standard library), a local file,
    directory or pattern of .jsonl, .parquet, .txt or .py (a text file is one document; .gz, .zst,
    .bz2 and .xz are unpacked), or the name of a dataset on the Hugging Face hub."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    text_field: str = "text"
    """Column of JSON lines, parquet files and hub datasets that holds the text; a dotted path leads
    into objects.
    """
    out: str = "data/stdlib"
    """Directory that is made and written."""
    tokenizer: str | None = None
    """A tokenizer.json to use; None trains a byte-level BPE on the training documents."""
    vocab_size: Count = 8192
    """Tokens of a trained vocabulary, special ones included; fewer when the corpus is too small for
    as many.
    """
    val_fraction: Annotated[float, Range(gt=0, lt=1)] = 0.02
    """Share of the documents that validate: chosen by a hash of their index and the seed, at least
    one.
    """
    append_eod: bool = True
    """End each document with the end-of-document token."""
    max_documents: Natural = 0
    """Use only this many documents from the start of the source; 0 for all."""
    seed: Natural = 0
    """Seed of the choice of validation documents and of the tokenizer's training sample."""
    overwrite: bool = False
    """Replace a dataset that `prepare` wrote before."""

    def __post_init__(self) -> None:
        """A single source may be given as a string."""
        if isinstance(self.source, str):
            object.__setattr__(self, "source", (self.source,))


def prepare_problems(config: PrepareConfig) -> list[Problem]:
    """Every number outside of its range, and every local rule that ``config`` breaks."""
    rules = [
        (
            bool(config.source) and all(config.source),
            "source",
            "is empty",
            "name a file, a directory, a hub dataset or stdlib",
        ),
        (bool(config.out), "out", "is empty", "name the directory to write"),
        (
            config.tokenizer is not None or config.vocab_size >= SMALLEST_VOCABULARY,
            "vocab_size",
            f"is below {SMALLEST_VOCABULARY}: 256 bytes and two special tokens",
            "use 8192",
        ),
    ]
    problems = [
        Problem(
            field=field,
            value=repr(getattr(config, field)),
            rule=rule,
            fix=fix,
        )
        for ok, field, rule, fix in rules
        if not ok
    ]
    return problems + untold(range_problems(config), problems)
