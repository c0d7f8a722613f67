"""The state of a run as logical tensors: layout-free names, global shapes, and the boxes of them
that this rank holds.

``fp32/<parameter>[.<part>]`` are the masters, ``<state>/<parameter>[.<part>]`` what the optimizer
keeps of each value and ``<state>/<optimizer group>`` what it keeps once, by the names that the
engine tells (AdamW's: ``exp_avg``, ``exp_avg_sq``, ``step``); ``buffer/<router bias>``;
``engram.<layer>.<weight, and what the table's format and optimizer keep of a row>``. All values are
live views: reading into them restores the run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from parallel.engine.protocol import Engine
from parallel.mesh import Mesh
from parallel.placement import PlacedParameter, Placement, placed_parameters
from training.checkpoint.format.boxes import Box, range_boxes
from training.engram.memory import EngramMemory
from training.model.model import HybridModel
from training.trainer import Trainer

MASTER = "fp32"


@dataclass(frozen=True)
class Chunk:
    """What this rank holds of a logical tensor."""

    box: Box
    values: torch.Tensor
    """The values of the box as they live in this process."""
    writes: bool = True
    """This rank is the one that saves it; holders of copies only load."""
    take: Callable[[Box, torch.Tensor], None] | None = None
    """Gets what is read, a block at a time, in place of ``values``, which tell the dtype alone."""

    def split(self, max_bytes: int) -> "Iterator[Chunk]":
        """The chunk in parts of at most ``max_bytes``, views of its values."""
        for box in self.box.split(max_bytes // self.values.itemsize):
            place = []
            for mine, theirs, size in zip(self.box.offset, box.offset, box.sizes, strict=True):
                start = theirs - mine
                place.append(slice(start, start + size))
            yield Chunk(box, self.values[tuple(place)], self.writes)


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor of the whole run; every rank knows it, whether it holds any of it or not."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """Type of the values as they are saved."""
    chunks: list[Chunk] = field(default_factory=list)


Tensors = dict[str, LogicalTensor]


def trainer_tensors(trainer: Trainer) -> Tensors:
    """All that a run must restore to go on: masters, the optimizer's state, router biases, table
    rows and their state.
    """
    tensors: Tensors = {}
    for state in (MASTER, *trainer.engine.value_states):
        _declare_parameters(tensors, state, trainer.model)
    _add_parameter_states(tensors, trainer)
    is_first = trainer.mesh.rank("world") == 0
    _add_group_states(tensors, trainer.engine, is_first)
    _add_buffers(tensors, trainer.model, is_first)
    _add_tables(tensors, trainer.memory, weights_only=False)
    return tensors


def weight_tensors(model: HybridModel, mesh: Mesh, memory: EngramMemory | None) -> Tensors:
    """What a model without an optimizer reads; its parameters may be bf16, the saved values are
    fp32.
    """
    tensors: Tensors = {}
    _declare_parameters(tensors, MASTER, model)
    for name, parameter in placed_parameters(model):
        _add_fragment(
            tensors,
            f"{MASTER}/{name}",
            parameter,
            0,
            parameter.detach().view(-1),
            mesh,
        )
    _add_buffers(tensors, model, writes=False)
    _add_tables(tensors, memory, weights_only=True)
    return tensors


def is_weight(name: str) -> bool:
    """Whether a logical tensor is one that ``weight_tensors`` names."""
    if name.startswith("engram."):
        return name.endswith((".weight", ".weight_scale"))
    return name.startswith((f"{MASTER}/", "buffer/"))


def _group_tag(placement: Placement) -> str:
    """An optimizer group by what its parameters have in common on every layout (the number of
    groups depends on EP).
    """
    kind = "experts" if placement.axis == "ep" else "dense"
    decay = "decay" if placement.decay else "plain"
    return f"{kind}-{decay}"


def _suffix(part_name: str) -> str:
    return f".{part_name}" if part_name else ""


def _declare_parameters(tensors: Tensors, state: str, model: nn.Module) -> None:
    for name, parameter in placed_parameters(model):
        placement = parameter.placement
        for piece in placement.cut(1, 0):
            shape = list(placement.shape)
            shape[placement.dim] = piece.part.size
            suffix = _suffix(piece.part.name)
            tensors[f"{state}/{name}{suffix}"] = LogicalTensor(tuple(shape), torch.float32)


def _add_parameter_states(tensors: Tensors, trainer: Trainer) -> None:
    names = {id(parameter): name for name, parameter in placed_parameters(trainer.model)}
    for fragment in trainer.engine.state_fragments():
        name = names[id(fragment.parameter)]
        states = {MASTER: fragment.master, **fragment.states}
        for state, values in states.items():
            _add_fragment(
                tensors,
                f"{state}/{name}",
                fragment.parameter,
                fragment.start,
                values,
                trainer.mesh,
            )


def _add_group_states(tensors: Tensors, engine: Engine, writes: bool) -> None:
    """All groups of a tag read the one tensor that is saved of the first."""
    for parameters, scalars in engine.group_states():
        tag = _group_tag(parameters[0].placement)
        for state, value in scalars.items():
            declared = LogicalTensor((1,), value.dtype)
            tensor = tensors.setdefault(f"{state}/{tag}", declared)
            is_saved = writes and not tensor.chunks
            chunk = Chunk(
                Box((0,), (1,)),
                value.view(1),
                is_saved,
            )
            tensor.chunks.append(chunk)


def _add_fragment(
    tensors: Tensors,
    name: str,
    parameter: PlacedParameter,
    start: int,
    values: torch.Tensor,
    mesh: Mesh,
) -> None:
    """Add what a piece of the flat local parameter, which begins at ``start``, holds of each packed
    part.
    """
    placement = parameter.placement
    dim = parameter.placement.dim
    place = 0
    rank = mesh.rank(placement.axis or "tp")
    for box in range_boxes(tuple(parameter.shape), start, start + values.numel()):
        block = values[place : place + box.numel].view(box.sizes)
        place += box.numel
        for piece in placement.slices(mesh):
            inside = box.clip(dim, piece.offset, piece.offset + piece.size)
            if inside is None:
                continue
            first = inside.offset[dim] - box.offset[dim]
            mine = block.narrow(dim, first, inside.sizes[dim])
            moved = inside.shift(dim, piece.start - piece.offset)
            is_saved = rank % piece.copies == 0
            tensor = tensors[name + _suffix(piece.part.name)]
            tensor.chunks.append(Chunk(moved, mine, is_saved))


def _add_buffers(tensors: Tensors, model: nn.Module, writes: bool) -> None:
    """What layers keep beside parameters, the same on all ranks: the routers' biases."""
    for name, values in model.named_buffers():
        box = Box((0,) * values.ndim, tuple(values.shape))
        chunk = Chunk(box, values, writes)
        tensors[f"buffer/{name}"] = LogicalTensor(box.sizes, values.dtype, [chunk])


def _add_tables(tensors: Tensors, memory: EngramMemory | None, weights_only: bool) -> None:
    if memory is None:
        return
    for name, (values, start, num_rows) in memory.tables.state().items():
        if weights_only and not is_weight(name):
            continue
        inner = tuple(values.shape[1:])
        box = Box((start, *[0] * len(inner)), tuple(values.shape))
        chunks = [Chunk(box, values)] if values.numel() else []
        tensors[name] = LogicalTensor((num_rows, *inner), values.dtype, chunks)
