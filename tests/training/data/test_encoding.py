"""Token ids in the smallest type that holds the vocabulary."""

import numpy as np
import pytest

from parallel.errors import RunError
from training.data.encoding import store_tokens, token_dtype


def test_type_follows_the_vocabulary():
    assert [token_dtype(size).name for size in (1, 65_536, 65_537, 2**31)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]
    with pytest.raises(
        RunError, match=r"vocab_size=2147483649 is above the 2147483648 ids that int32 holds"
    ):
        token_dtype(2**31 + 1)


@pytest.mark.parametrize(
    ("ids", "vocab", "dtype"),
    [([5, 300], 300, "uint16"), ([65_536], 70_000, "uint16"), ([-1], 9, "int32")],
)
def test_tokens_never_wrap(ids, vocab, dtype):
    with pytest.raises(RunError, match=f"token id={ids[-1]} is outside"):
        store_tokens(ids, vocab, np.dtype(dtype))
    assert store_tokens([0, 299], 300, np.dtype("uint16")).tolist() == [0, 299]
