"""Prime table sizes of Engram's hash heads. No torch and no numpy in here: planning imports it."""

from collections.abc import Sequence

# Miller-Rabin with these bases is deterministic below 3.3e24 (Sorenson and Webster 2015), so for
# every int64.
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    """Whether ``n`` is prime; exact below 3.3e24."""
    if n < 2 or any(n % p == 0 for p in WITNESSES):
        return n in WITNESSES
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> twos

    def passes(base: int) -> bool:
        x = pow(base, odd, n)
        return x == 1 or any(pow(x, 2**i, n) == n - 1 for i in range(twos))

    return all(passes(base) for base in WITNESSES)


def _next_prime(start: int, seen: set[int]) -> int:
    """The smallest prime that is at least ``start`` and not in ``seen``; adds it to ``seen``."""
    while start in seen or not is_prime(start):
        start += 1
    seen.add(start)
    return start


def table_primes(
    num_layers: int, sizes: Sequence[int], num_heads: int
) -> list[tuple[tuple[int, ...], ...]]:
    """[layer][order][head]: each head takes the next unused prime from its order's size on; all are
    distinct.
    """
    seen: set[int] = set()
    return [
        tuple(tuple(_next_prime(size, seen) for _ in range(num_heads)) for size in sizes)
        for _ in range(num_layers)
    ]
