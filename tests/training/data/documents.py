"""Documents to be prepared, their files, and what was prepared of them."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from training.data.files import import_indexed_dataset

WORDS = [
    "def",
    "return",
    "self",
    "lambda",
    "",
    "\n\t",
    "x1",
    "naïve",
    "语言",
    "🙂",
    "<|endoftext|>",
    "(x,",
    "y)",
    "==",
]


def make_documents(count=40) -> list[str]:
    """Documents of thirty words, each with its number."""
    random = np.random.RandomState(3)
    return [f"# {index}\n" + " ".join(random.choice(WORDS, 30)) + "\n" for index in range(count)]


def write_jsonl(path: Path, documents) -> Path:
    """A file of JSON lines with a column ``id`` beside the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    )
    return path


def contents(directory) -> dict[str, bytes]:
    """The bytes of each file of a directory, by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def read_split(directory, split) -> list[list[int]]:
    """Token ids of each document of a split, by megatron-core's reader."""
    index = import_indexed_dataset().IndexedDataset(str(Path(directory) / split))
    assert index.document_indices.tolist() == list(range(len(index) + 1))
    return [index[i].tolist() for i in range(len(index))]


def word_tokenizer(path: Path, words) -> Path:
    """A tokenizer of whole words that would truncate and pad if it were let."""
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="unk")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    return path
