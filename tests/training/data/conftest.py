"""Documents to be prepared, as most tests of it begin."""

import pytest

from tests.training.data.documents import make_documents, write_jsonl
from training.data.config import PrepareConfig


@pytest.fixture
def config(tmp_path):
    """Forty documents in one file, a fifth of which are to validate."""
    source = write_jsonl(tmp_path / "in" / "docs.jsonl", make_documents())
    return PrepareConfig(
        source=str(source), out=str(tmp_path / "out" / "set"), vocab_size=300, val_fraction=0.2
    )
