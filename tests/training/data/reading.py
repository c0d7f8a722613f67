"""Sources of a few texts, and what is read of them."""

import json

from training.data.config import PrepareConfig
from training.data.corpus import Reading, open_documents, write_documents


def lines(*texts) -> str:
    """JSON lines with these texts."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def read(tmp_path, *sources, **fields) -> tuple[list[str], Reading]:
    """The documents of these sources, and what was told of them."""
    config = PrepareConfig(source=tuple(map(str, sources)), **fields)
    path = tmp_path / "documents.arrow"
    reading = write_documents(config, path, show=False)
    documents = open_documents(path)["text"]
    assert len(documents) == reading.documents
    return list(documents), reading


def small(tmp_path, *texts) -> PrepareConfig:
    """What prepares these texts, in a vocabulary of 300."""
    (tmp_path / "docs.jsonl").write_text(lines(*texts))
    return PrepareConfig(
        source=str(tmp_path / "docs.jsonl"), out=str(tmp_path / "out" / "set"), vocab_size=300
    )
