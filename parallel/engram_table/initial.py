"""Initial rows: the same on every layout."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

BLOCK_ROWS = 4096  # rows drawn from one seed


def fill_initial_rows(rows_RW: torch.Tensor, start: int, *, std: float, seed: int, layer: int) -> None:
    """Fill with normal values of standard deviation ``std`` that depend only on (seed, layer, global row, width).

    Each block of global rows has a generator of its own, so any owner draws the same rows. Blocks are filled by as
    many threads as PyTorch uses (numpy draws without the interpreter lock); this is the first touch of the memory.

    Args:
        rows_RW: (rows, W) fp32, host memory; the global rows from ``start`` on.
    """
    width, stop = rows_RW.shape[1], start + rows_RW.shape[0]

    def fill(block: int) -> None:
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, layer, block))))
        values = generator.standard_normal((BLOCK_ROWS, width), dtype=np.float32)
        values *= np.float32(std)
        first = block * BLOCK_ROWS
        low, high = max(start, first), min(stop, first + BLOCK_ROWS)
        rows_RW[low - start : high - start] = torch.from_numpy(values[low - first : high - first])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(fill, range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS))):
            pass  # raises what a thread raised
