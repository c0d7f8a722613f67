"""``gather_rows``'s loop, compiled by numba."""

# numba has types of its own
# mypy: ignore-errors

import numba

from kernels.prefetch import AHEAD, prefetch_row


@numba.njit(nogil=True, cache=True)
def gather(table, rows, out):
    """out[u] = table[rows[u]], all C-contiguous; rows exist."""
    for u in range(rows.size):
        prefetch_row(table, rows[min(u + AHEAD, rows.size - 1)])
        r = rows[u]
        for c in range(table.shape[1]):
            out[u, c] = table[r, c]
