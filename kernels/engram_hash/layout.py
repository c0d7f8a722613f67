"""Which hash functions the Engram layers use: multipliers and prime table sizes, from a seed. No
torch in here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import numpy as np

from kernels.primes import table_primes

INT64_MAX = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class NgramHash:
    """The hash functions of one Engram layer; its tables lie one after another in one logical row
    space.

    Columns are order-major: all heads of the smallest order first.
    """

    multipliers: tuple[int, ...]
    """Odd factors, one for each distance k = 0 .. max_order - 1 back from the position."""
    primes: tuple[tuple[int, ...], ...]
    """Rows of each table: one tuple of heads an order."""
    orders: tuple[int, ...]
    """Lengths of the n-grams, ascending."""
    vocab_size: int
    """V', ids are below it; ``id * multiplier`` then fits int64."""
    pad_id: int
    """The id that stands before the start of a document."""

    @property
    def max_order(self) -> int:
        """Tokens that a row depends on, at most: the position's own and the ``max_order - 1``
        before it.
        """
        return self.orders[-1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of each column's table."""
        return (0, *accumulate(chain(*self.primes)))[:-1]

    @cached_property
    def num_rows(self) -> int:
        """Rows of all tables together."""
        return sum(chain(*self.primes))

    @cached_property
    def num_columns(self) -> int:
        """O, rows that one position looks up: orders x heads."""
        return sum(map(len, self.primes))


def _multipliers(
    layer: int,
    vocab_size: int,
    max_order: int,
    seed: int,
) -> tuple[int, ...]:
    half = max(1, INT64_MAX // vocab_size // 2)
    drawn = np.random.default_rng(seed + 10007 * layer).integers(
        0, half, size=max_order, dtype=np.int64
    )
    return tuple(2 * int(m) + 1 for m in drawn)


def _check(
    layers: Sequence[int],
    vocab_size: int,
    orders: tuple[int, ...],
    num_heads: int,
    sizes: tuple[int, ...],
    pad_id: int,
) -> None:
    if len(set(layers)) != len(layers) or min(layers, default=0) < 0:
        raise ValueError(f"layers: got {tuple(layers)}, expected distinct indices of at least 0")
    if not 1 <= vocab_size <= 2**31:
        raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to 2**31")
    if not orders or orders[0] < 1 or list(orders) != sorted(set(orders)):
        raise ValueError(f"orders: got {orders}, expected ascending orders of at least 1")
    if num_heads < 1:
        raise ValueError(f"num_heads: got {num_heads}, expected at least 1")
    if len(sizes) != len(orders) or min(sizes) < 1:
        raise ValueError(
            f"table_size: got {sizes}, expected one size of at least 1 for each of the orders "
            f"{orders}"
        )
    if not 0 <= pad_id < vocab_size:
        raise ValueError(f"pad_id: got {pad_id}, expected 0 to vocab_size - 1 = {vocab_size - 1}")


def ngram_hashes(
    layers: Sequence[int],
    vocab_size: int,
    orders: Sequence[int],
    num_heads: int,
    table_size: int | Sequence[int],
    seed: int,
    pad_id: int,
) -> dict[int, NgramHash]:
    """Draw the hash functions of all Engram layers; the same arguments give the same functions on
    every machine.

    Every head of every order of every layer gets a prime of its own, the next unused one from
    ``table_size`` on, in the order layers, orders, heads: naming the layers in another order gives
    other tables. Multipliers are odd and below ``2**63 / vocab_size``, so no product overflows and
    no mix is negative. The procedure is that of the official demo (deepseek-ai/Engram,
    ``NgramHashMapping``).

    Args:
        layers: 0-based places of the layers.
        vocab_size: V', size of the (compressed) vocabulary. It sets the bound of the multipliers.
        table_size: smallest number of rows a head, one for all orders or one an order.
        pad_id: compressed id that stands before the start of a document.

    Raises:
        ValueError: an argument is out of range.
    """
    orders = tuple(orders)
    sizes = (table_size,) * len(orders) if isinstance(table_size, int) else tuple(table_size)
    _check(
        layers,
        vocab_size,
        orders,
        num_heads,
        sizes,
        pad_id,
    )
    return {
        layer: NgramHash(
            multipliers=_multipliers(layer, vocab_size, orders[-1], seed),
            primes=primes,
            orders=orders,
            vocab_size=vocab_size,
            pad_id=pad_id,
        )
        for layer, primes in zip(layers, table_primes(len(layers), sizes, num_heads), strict=True)
    }
