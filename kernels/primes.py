"""Prime table sizes of Engram's hash heads. No torch and no numpy in here: planning imports it."""

from collections.abc import Sequence

# Miller-Rabin with these bases is deterministic below 3.3e24 (Sorenson and Webster 2015), so for
# every int64.
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    """Whether ``n`` is prime; exact below 3.3e24."""
    if n < 2:
        return False
    for prime in WITNESSES:
        if n % prime == 0:
            return n == prime
    return all(_passes(n, base) for base in WITNESSES)


def _passes(n: int, base: int) -> bool:
    """Whether an odd ``n`` looks prime to one base of Miller and Rabin's test."""
    odd = n - 1
    twos = 0
    while odd % 2 == 0:
        odd //= 2
        twos += 1
    x = pow(base, odd, n)
    if x == 1:
        return True
    for _ in range(twos):
        if x == n - 1:
            return True
        x = x * x % n
    return False


def _next_prime(start: int, seen: set[int]) -> int:
    """The smallest prime that is at least ``start`` and not in ``seen``; adds it to ``seen``."""
    while start in seen or not is_prime(start):
        start += 1
    seen.add(start)
    return start


def table_primes(
    num_layers: int, sizes: Sequence[int], num_heads: int
) -> list[tuple[tuple[int, ...], ...]]:
    """[layer][order][head]: each head takes the next unused prime from its order's size on.

    The order of layers, orders and heads decides who gets which: all primes are distinct.
    """
    seen: set[int] = set()
    layers = []
    for _ in range(num_layers):
        orders = []
        for size in sizes:
            heads = [_next_prime(size, seen) for _ in range(num_heads)]
            orders.append(tuple(heads))
        layers.append(tuple(orders))
    return layers
