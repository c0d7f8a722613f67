"""Engram tables as the product uses them, in one call each: rows without a graph, rows and state
that are loaded, and the gradients that a step would take.
"""

from collections.abc import Mapping

import torch

from parallel.engram_table import EngramTables, Piece


@torch.no_grad()
def look_up(tables: EngramTables, ids: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """(…, O * W) a layer, as evaluation and generation see it. Collective over ``engram``."""
    return {layer: rows.embed() for layer, rows in tables.fetch(ids).items()}


def load(tables: EngramTables, pieces: Mapping[str, Piece]) -> None:
    """Copy in what ``state`` gave on the same layout, in place, as a checkpoint is loaded."""
    mine = tables.state()
    assert mine.keys() == pieces.keys()
    for name, piece in mine.items():
        assert piece[1:] == pieces[name][1:], name
        piece.tensor.copy_(pieces[name].tensor)
    tables.loaded()


def touched_gradients(tables: EngramTables) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """layer -> global rows owned here that were touched since the last step (U,), and their
    gradients (U, W).
    """
    rows_U, grad_UW = tables.worker.wait(tables.worker.submit(tables._merged))
    gradients = {}
    for layer in tables.layout.layers:
        local = tables.layout.local(layer, tables.mesh.rank("engram"))
        mine = (rows_U >= local.start) & (rows_U < local.stop)
        first = tables.owned(layer).start
        gradients[layer] = (rows_U[mine] - local.start + first, grad_UW[mine])
    return gradients
