"""Random orders that any process can compute alone, and that stay the same across versions of
numpy.

Only the raw stream of Philox is used: numpy keeps bit generators' streams stable, but not those of
shuffle().
"""

import numpy as np


def random_bits(count: int, *key: int) -> np.ndarray:
    """``count`` uint64, a pure function of place and key (integers >= 0): a longer call begins with
    a shorter one.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def random_order(count: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. count - 1 as int64, a pure function of count and key."""
    return np.argsort(random_bits(count, *key), kind="stable")
