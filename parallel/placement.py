"""Where a parameter lives, declared once: its global shape, the dim that is cut, over which axis,
and in what parts.

Initialisation (the same values on every layout), gradient reduction, norms and checkpoints all read
this declaration.

A cut dim consists of packed ``Part``s (``in_proj`` = z, x, B, C, dt), each made of indivisible
``units`` (heads, groups, channels, experts). A part with fewer units than ranks is replicated:
``copies`` neighbouring ranks hold a unit.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from parallel.collectives import sum_in_place
from parallel.mesh import Mesh

# Fills a block of a parameter: (generator, shape of the block) -> fp32 values.
Init = Callable[[torch.Generator, tuple[int, ...]], torch.Tensor]

# Values drawn from one seed; a rank draws only the blocks that it owns a part of.
BLOCK_NUMEL = 2**20


def normal(std: float) -> Init:
    """An initial value of independent normal numbers."""
    return lambda generator, shape: torch.randn(shape, generator=generator) * std


def uniform(low: float, high: float) -> Init:
    """An initial value of independent uniform numbers."""
    return lambda generator, shape: torch.rand(shape, generator=generator) * (high - low) + low


def constant(value: float) -> Init:
    """An initial value that is the same everywhere."""
    return lambda _, shape: torch.full(shape, value)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A named piece of a cut dim: ``size`` entries in ``units`` equal, indivisible units."""

    name: str = ""
    size: int
    units: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What one rank holds of one part: global [start, stop) inside the part, at ``offset`` of the
    local dim.
    """

    part: Part
    start: int
    stop: int
    offset: int
    copies: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Global shape and cut of one parameter."""

    shape: tuple[int, ...]
    init: Init
    axis: Literal["tp", "ep"] | None = None
    """Mesh axis over which ``dim`` is cut; None is a replica on every tensor rank."""
    dim: int = 0
    parts: tuple[Part, ...] = ()
    """Packed parts of the cut dim, in order; empty for one part that any size may divide."""
    partial: bool = False
    """A replica whose gradient on each tensor rank covers only that rank's tokens:
    summed over tp.
    """
    decay: bool = True
    """Whether weight decay applies to the parameter."""
    fp32: bool = False
    """Kept in fp32 when the model computes in bf16: decays, step sizes, routers."""
    whole_init: bool = field(default=False)
    """``init`` is called once with the global shape (structured values), not block by block."""

    def cut(self, num_ranks: int, rank: int) -> tuple[Slice, ...]:
        """The slices that ``rank`` of ``num_ranks`` along ``axis`` holds, in local order.

        Raises:
            ValueError: a part's units and the ranks do not divide each other.
        """
        slices = []
        offset = 0
        for part in self.parts or (self._whole_dim(),):
            if part.units % num_ranks and num_ranks % part.units:
                raise ValueError(
                    f"{part.units} units of part {part.name!r} and {num_ranks} ranks do not "
                    "divide each other"
                )
            copies = max(1, num_ranks // part.units)
            num_shares = max(1, num_ranks // copies)
            share = part.size // num_shares
            start = rank // copies * share
            slices.append(
                Slice(
                    part=part,
                    start=start,
                    stop=start + share,
                    offset=offset,
                    copies=copies,
                )
            )
            offset += share
        return tuple(slices)

    def _whole_dim(self) -> Part:
        """The cut dim as one part that any size may divide."""
        size = self.shape[self.dim] if self.shape else 1
        return Part(size=size, units=size)

    def slices(self, mesh: Mesh) -> tuple[Slice, ...]:
        """This rank's slices; a replica over tp is one slice with ``tp`` copies."""
        if self.axis is not None:
            return self.cut(mesh.size(self.axis), mesh.rank(self.axis))
        whole = self._whole_dim()
        replica = Slice(
            part=whole,
            start=0,
            stop=whole.size,
            offset=0,
            copies=mesh.size("tp"),
        )
        return (replica,)

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of what this rank holds."""
        if self.axis is None:
            return self.shape
        local = list(self.shape)
        local[self.dim] = sum(piece.size for piece in self.slices(mesh))
        return tuple(local)


class PlacedParameter(nn.Parameter):
    """A parameter that knows its ``placement``."""

    placement: Placement
    # Read by DeepSpeed; the last two are of experts alone, and made when an engine starts.
    tensor_model_parallel: bool
    allreduce: bool
    group_name: str

    def __deepcopy__(self, memo):
        copy = declare_like(self)
        memo[id(self)] = copy
        return copy


def declare_like(parameter: "PlacedParameter") -> "PlacedParameter":
    """A copy of a placed parameter with its declaration."""
    copy = PlacedParameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    copy.placement = parameter.placement
    return copy


def declare(placement: Placement, mesh: Mesh) -> PlacedParameter:
    """An uninitialised parameter of this rank's local shape, on the default device, that carries
    its placement.
    """
    parameter = PlacedParameter(torch.empty(placement.local_shape(mesh)))
    parameter.placement = placement
    if placement.axis is not None:
        parameter.tensor_model_parallel = True
    return parameter


def placed_parameters(model: nn.Module) -> Iterator[tuple[str, PlacedParameter]]:
    """All parameters with their logical names.

    Raises:
        TypeError: a parameter was made without a placement; it would be reduced and saved wrongly.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, PlacedParameter):
            raise TypeError(
                f"parameter {name} declares no placement; make it with parallel.placement.declare"
            )
        yield name, parameter


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    return torch.Generator().manual_seed(number & (2**63 - 1))


def _global_rows(placement: Placement, seed: int, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of dim 0 of the global initial value; the same on every layout."""
    shape = placement.shape
    if placement.whole_init or not shape:
        return placement.init(_generator(seed, name, 0), shape)[start:stop]
    row_shape = shape[1:]
    row_numel = max(1, math.prod(row_shape))
    rows = max(1, BLOCK_NUMEL // row_numel)
    first_block = start // rows
    stop_block = -(-stop // rows)
    blocks = []
    for block in range(first_block, stop_block):
        first = block * rows
        last = min(first + rows, shape[0])
        generator = _generator(seed, name, block)
        values = placement.init(generator, (last - first, *row_shape))
        wanted = slice(max(start - first, 0), stop - first)
        blocks.append(values[wanted])
    if not blocks:
        return torch.empty((0, *row_shape))
    return torch.cat(blocks)


@torch.no_grad()
def initialize_parameters(model: nn.Module, mesh: Mesh, seed: int) -> None:
    """Fill every parameter; values depend only on (seed, logical name, place in the global
    tensor).
    """
    for name, parameter in placed_parameters(model):
        placement = parameter.placement
        if placement.axis is None:
            values = _global_rows(placement, seed, name, 0, placement.shape[0])
            parameter.copy_(values)
            continue
        base = 0
        for piece in placement.slices(mesh):
            start = base + piece.start
            stop = base + piece.stop
            if placement.dim == 0:
                values = _global_rows(placement, seed, name, start, stop)
            else:
                whole = _global_rows(placement, seed, name, 0, placement.shape[0])
                values = whole.narrow(placement.dim, start, piece.size)
            mine = parameter.narrow(placement.dim, piece.offset, piece.size)
            mine.copy_(values)
            base += piece.part.size


def register_gradient_reduction(model: nn.Module, mesh: Mesh) -> None:
    """Sum over tp what each tensor rank knows only a share of: partial replicas, and parts with
    copies.

    DeepSpeed reduces over data ranks only. The sum is made in fp32, as each gradient arrives.
    """
    if mesh.size("tp") == 1:
        return
    for _, parameter in placed_parameters(model):
        placement = parameter.placement
        shared = []
        if placement.axis == "tp":
            shared = [piece for piece in placement.slices(mesh) if piece.copies > 1]
        if placement.partial or shared:
            parameter.register_hook(_tp_reduction(placement, shared, mesh))


def _tp_reduction(
    placement: Placement, shared: list[Slice], mesh: Mesh
) -> Callable[[torch.Tensor], torch.Tensor]:
    group = mesh.group("tp")

    def reduce(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.float() if gradient.dtype == torch.bfloat16 else gradient.clone()
        if placement.axis is None:
            sum_in_place(total, group)
        for piece in shared:
            # A unit's copies are few neighbours: one sum of the whole part serves all of them,
            # without a group for each unit.
            mine = total.narrow(placement.dim, piece.offset, piece.size)
            shape = list(mine.shape)
            shape[placement.dim] = piece.part.size
            whole = mine.new_zeros(shape)
            place = whole.narrow(placement.dim, piece.start, piece.size)
            place.copy_(mine)
            sum_in_place(whole, group)
            mine.copy_(place)
        return total.to(gradient.dtype)

    return reduce


def squared_norm(
    parameter: PlacedParameter, start: int, values: torch.Tensor, mesh: Mesh
) -> torch.Tensor:
    """Squared norm of a fragment of a parameter's flat gradient, each global element weighted 1
    over all tp ranks.

    Args:
        start: place of ``values`` in the flat local parameter.
        values: (n,) contiguous piece of the flat gradient.
    """
    placement = parameter.placement
    pieces = placement.slices(mesh)
    if len({piece.copies for piece in pieces}) == 1:
        # Experts are replicated over expt_dp only, over which ZeRO cuts them.
        copies = 1 if placement.axis == "ep" else pieces[0].copies
        return values.float().square().sum() / copies
    if placement.dim != 0:
        raise ValueError("parts with different copies must be packed along dim 0")
    row = math.prod(parameter.shape[1:])
    total = values.new_zeros((), dtype=torch.float32)
    stop = start + values.numel()
    for piece in pieces:
        piece_start = piece.offset * row
        piece_stop = piece_start + piece.size * row
        low = max(piece_start, start) - start
        high = min(piece_stop, stop) - start
        if low < high:
            squares = values[low:high].float().square()
            total = total + squares.sum() / piece.copies
    return total
