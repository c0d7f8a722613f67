"""Ids to the owners of their rows, rows back, gradients to the owners: over the ``engram`` axis.

Ids and counts travel in host memory (gloo): the exchange never waits for the device. Rows and
gradients travel on the compute device. All layers share one exchange. On one rank nothing is
communicated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from parallel.collectives import all_to_all_rows
from parallel.engram_table.grouping import Groups
from parallel.engram_table.layout import RowLayout
from parallel.mesh import Mesh


@dataclass(frozen=True)
class Route:
    """The way of one fetch, kept for the way back. Nothing of it is shared with another fetch.

    Attributes:
        pieces: [owner][layer] numbers of distinct rows asked; rows travel in this order.
        sent: rows asked of each owner.
        received: rows that each rank asks of this one.
        local_rows: int64, the local rows that are asked of this rank, by asking rank; host memory.
    """

    pieces: list[list[int]]
    sent: list[int]
    received: list[int]
    local_rows: torch.Tensor


def open_route(
    groups: Sequence[Groups], layout: RowLayout, mesh: Mesh
) -> tuple[Route, list[torch.Tensor]]:
    """Ask the owners for the distinct rows of all layers. Collective over ``engram``: counts, then
    ids.

    Args:
        groups: one a layer, in the layout's order of layers.

    Returns:
        The route, and for each layer (U,) int64, the places of its rows among all that come back.
    """
    counts = []
    local_ids = []
    for layer, asked in zip(layout.layers, groups, strict=True):
        of_owners = torch.searchsorted(asked.rows_U, layout.bounds[layer]).diff()
        counts.append(of_owners)
        shift = layout.shift[layer]
        if len(shift) > 1:  # one owner's is broadcast
            shift = shift.repeat_interleave(of_owners)
        local_ids.append(asked.rows_U + shift)
    table = torch.stack(counts, 1)
    pieces = table.tolist()
    sent = table.sum(1)
    size = mesh.size("engram")
    group = mesh.group("engram")
    received = all_to_all_rows(sent, [1] * size, [1] * size, group).tolist()
    local_rows = all_to_all_rows(
        by_owner(local_ids, pieces),
        sent.tolist(),
        received,
        group,
    )
    in_order = [count for owner in pieces for count in owner]
    places = torch.arange(int(table.sum())).split(in_order)
    num_layers = len(groups)
    slots = [torch.cat(places[index::num_layers]) for index in range(num_layers)]
    route = Route(
        pieces=pieces,
        sent=sent.tolist(),
        received=received,
        local_rows=local_rows,
    )
    return route, slots


def by_owner(layers: Sequence[torch.Tensor], pieces: list[list[int]]) -> torch.Tensor:
    """One tensor for the wire, owner after owner, from one a layer; ``pieces`` as in Route."""
    if len(layers) == 1:
        return layers[0]
    split = []
    for index, layer in enumerate(layers):
        of_owners = [owner[index] for owner in pieces]
        split.append(layer.split(of_owners))
    in_order: list[torch.Tensor] = []
    for owner in zip(*split, strict=True):
        in_order.extend(owner)
    return torch.cat(in_order)


def return_rows(rows_MW: torch.Tensor, route: Route, mesh: Mesh) -> torch.Tensor:
    """Owners' answers to those who asked. Collective over ``engram``."""
    return all_to_all_rows(
        rows_MW,
        route.received,
        route.sent,
        mesh.group("engram"),
    )


def resend(
    changed_U: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor], route: Route, mesh: Mesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of an answered fetch that have changed since. Collective over ``engram``: counts,
    places, rows.

    Args:
        changed_U: int64, ascending, local rows of this owner; host memory.
        read: rows as they are now, as ``return_rows`` sends them.

    Returns:
        Places among the rows that came back, and those rows' new values.
    """
    asked_M = route.local_rows
    hit_M = torch.zeros(len(asked_M), dtype=torch.bool)
    if len(changed_U):
        places_M = torch.searchsorted(changed_U, asked_M)
        nearest_M = changed_U[places_M.clamp_max(len(changed_U) - 1)]
        hit_M = nearest_M == asked_M
    size = mesh.size("engram")
    group = mesh.group("engram")
    hits = [part.nonzero().flatten() for part in hit_M.split(route.received)]
    rows = read(asked_M[hit_M])
    if size == 1:
        return hits[0], rows
    counts = torch.tensor([len(hit) for hit in hits])
    coming = all_to_all_rows(counts, [1] * size, [1] * size, group)
    given = counts.tolist()
    taken = coming.tolist()
    places = all_to_all_rows(torch.cat(hits), given, taken, group)
    new_rows = all_to_all_rows(rows, given, taken, group)
    sent = torch.tensor(route.sent)
    begins = sent.cumsum(0) - sent
    return places + begins.repeat_interleave(coming), new_rows


def send_gradients(grad_UW: torch.Tensor, route: Route, mesh: Mesh) -> torch.Tensor:
    """Gradients to the owners, in the order of ``route.local_rows``: the transpose of
    ``return_rows``.
    """
    return all_to_all_rows(
        grad_UW,
        route.sent,
        route.received,
        mesh.group("engram"),
    )
