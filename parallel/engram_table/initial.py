"""Initial rows: the same on every layout."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from parallel.engram_table.store import RowStore

BLOCK_ROWS = 4096  # rows drawn from one seed


@torch.no_grad()
def fill_initial_rows(
    store: RowStore, local: slice, start: int, std: float, seed: int, layer: int
) -> None:
    """Fill with normal values of standard deviation ``std`` that depend only on (seed, layer,
    global row, width).

    Each block of global rows has a generator of its own, so any owner draws the same rows. Blocks
    are filled by as many threads as PyTorch uses (numpy draws without the interpreter lock); this
    is the first touch of the memory, by the process that will read it.

    Args:
        local: the local rows of the layer.
        start: the global row of the first of them.
    """
    stop = start + local.stop - local.start
    device = store.weight.device

    @torch.no_grad()
    def fill(block: int) -> None:
        sequence = np.random.SeedSequence((seed, layer, block))
        generator = np.random.Generator(np.random.SFC64(sequence))
        # a whole block, even where only some of its rows are owned here: any owner draws the same
        values = generator.standard_normal((BLOCK_ROWS, store.width), dtype=np.float32)
        values *= np.float32(std)
        first = block * BLOCK_ROWS
        low = max(start, first)
        high = min(stop, first + BLOCK_ROWS)
        shift = local.start - start
        rows = torch.arange(low + shift, high + shift, device=device)
        drawn = torch.from_numpy(values[low - first : high - first])
        store.write(rows, drawn.to(device), torch.zeros_like(rows))

    first_block = start // BLOCK_ROWS
    end_block = -(-stop // BLOCK_ROWS)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(fill, range(first_block, end_block)):
            pass  # raises what a thread raised
