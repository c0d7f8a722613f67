"""The bookkeeping of ``HotRows``, compiled by numba: it runs without the interpreter lock.

Shape suffixes: R rows of this rank, S sets, V places of a set, U rows asked for.
"""

# numba has types of its own
# mypy: ignore-errors

import numpy as np

from kernels.compiled_loops import compile_loop
from kernels.prefetch import AHEAD, prefetch_row

_compile = compile_loop()


@_compile
def find(kept_SV, rows_U, places_U):
    """places[u] = where rows[u] is kept, -1 where it is not."""
    sets, ways = kept_SV.shape
    for u in range(rows_U.size):
        s = rows_U[u] % sets
        places_U[u] = -1
        for v in range(ways):
            if kept_SV[s, v] == rows_U[u]:
                places_U[u] = s * ways + v


@_compile
def count_uses(kept_SV, heat_SV, heat_R, rows_U, now):
    """Heat each row by a use that counts 2^now; one that is hotter than the coldest of its set
    takes that one's place.

    ``heat_SV`` has the heat of the rows that are kept, ``heat_R`` that of all others.
    """
    sets, ways = kept_SV.shape
    for u in range(rows_U.size):
        prefetch_row(heat_R, rows_U[min(u + AHEAD, rows_U.size - 1)])
        row = rows_U[u]
        s = row % sets
        way = -1
        coldest = 0
        for v in range(ways):
            if kept_SV[s, v] == row:
                way = v
            if heat_SV[s, v] < heat_SV[s, coldest]:
                coldest = v
        if way >= 0:
            heat_SV[s, way] = _used(heat_SV[s, way], now)
            continue
        heat_R[row] = _used(heat_R[row], now)
        if heat_R[row] > heat_SV[s, coldest]:
            if kept_SV[s, coldest] >= 0:
                heat_R[kept_SV[s, coldest]] = heat_SV[s, coldest]
            kept_SV[s, coldest] = row
            heat_SV[s, coldest] = heat_R[row]


@_compile
def _used(heat, now):
    """Give log2(2^heat + 2^now): a use now, added to those before."""
    return np.float32(max(heat, now) + np.log2(1 + np.exp2(-abs(heat - now))))
