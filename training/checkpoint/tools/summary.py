"""What a checkpoint holds, from its manifest and DCP's metadata: no values are read."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.checkpoint.format.logical import MASTER, is_weight
from training.checkpoint.tools.reader import Reader, StoredTensor

# Words for what names begin with, in the order in which they are shown. An optimizer's state that
# has none here goes by its own name.
WORDS = {
    MASTER: "parameters",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
    "step": "steps",
    "buffer": "router biases",
}
TABLES = ("Engram rows", "Engram state")
# Parameter, shape, dtype, bytes.
Tensor = tuple[str, tuple[int, ...], str, int]
LAYER = re.compile(r"(?<=layers\.)(\d+)|(?<=engram\.)(\d+)")


@dataclass(frozen=True)
class Line:
    """Tensors of one role: the same name in other layers, or for another state of the same
    parameter.
    """

    name: str
    """With ``*`` for the layer's number, and packed parts in braces."""
    layers: tuple[int, ...]
    """The layers that have it; empty where it belongs to none."""
    shape: str
    dtype: str
    states: tuple[str, ...]
    """Which of the checkpoint's ``parameter_states`` it stands for."""
    num_tensors: int
    num_bytes: int


def kind_of(name: str) -> str:
    """The kind of a logical tensor, in words."""
    if name.startswith("engram."):
        return TABLES[0] if is_weight(name) else TABLES[1]
    state, slash, _ = name.partition("/")
    return WORDS.get(state, state) if slash else "other"


def parameter_states(tensors: Iterable[str]) -> tuple[str, ...]:
    """What a checkpoint holds of each parameter, the master first: whatever stands before the name
    of one that has a master.
    """
    split = [name.partition("/") for name in tensors]
    parameters = {parameter for state, _, parameter in split if state == MASTER}
    states = [state for state, _, parameter in split if parameter in parameters]
    return tuple(dict.fromkeys([MASTER, *states]))


def sizes_by_kind(tensors: dict[str, StoredTensor]) -> dict[str, tuple[int, int, int]]:
    """(tensors, elements, bytes) of each kind that there is."""
    sizes: dict[str, tuple[int, int, int]] = {}
    found = sorted({kind_of(name) for name in tensors})
    for kind in dict.fromkeys((*WORDS.values(), *TABLES, *found)):
        mine = [tensor for name, tensor in tensors.items() if kind_of(name) == kind]
        if mine:
            num_bytes = sum(tensor.num_bytes for tensor in mine)
            sizes[kind] = (len(mine), sum(t.num_bytes // t.dtype.itemsize for t in mine), num_bytes)
    return sizes


def as_json(reader: Reader) -> dict[str, Any]:
    """All that ``inspect`` knows, for machines."""
    manifest = reader.manifest
    kinds = {
        kind: {"tensors": count, "elements": elements, "bytes": size}
        for kind, (count, elements, size) in sizes_by_kind(reader.tensors).items()
    }
    tensors = {
        name: {
            "shape": list(tensor.shape),
            "dtype": _dtype(tensor),
            "bytes": tensor.num_bytes,
            "chunks": len(tensor.chunks),
            "kind": kind_of(name),
        }
        for name, tensor in reader.tensors.items()
    }
    copied = {
        key: manifest.get(key)
        for key in ("step", "format", "layout", "model", "token_map", "hashes", "extra")
    }
    weights_only = manifest.get("weights_only", False)
    return {
        "path": str(reader.path),
        **copied,
        "weights_only": weights_only,
        "files": manifest["files"],
        "kinds": kinds,
        "tensors": tensors,
    }


def all_lines(reader: Reader) -> list[Line]:
    """Yield one line for each tensor."""
    return [
        Line(
            name,
            (),
            _shape(tensor.shape),
            _dtype(tensor),
            (),
            1,
            tensor.num_bytes,
        )
        for name, tensor in _in_order(reader)
    ]


def folded_lines(reader: Reader) -> list[Line]:
    """One line for what differs in layer, packed part or state (master, moments) only."""
    known = parameter_states(reader.manifest["tensors"])
    states: dict[Tensor, list[str]] = defaultdict(list)
    for name, tensor in _in_order(reader):
        parameter, state = _state_of(name, known)
        states[parameter, tensor.shape, _dtype(tensor), tensor.num_bytes].append(state)
    layers: dict[tuple, list[tuple[int | None, int, int]]] = defaultdict(list)
    for name, shape, dtype, kept, count, size in _pack(states):
        layer = LAYER.search(name)
        layers[LAYER.sub("*", name), shape, dtype, kept].append(
            (int(layer[0]) if layer else None, count, size)
        )
    return [
        Line(
            name,
            tuple(n for n, _, _ in found if n is not None),
            shape,
            dtype,
            kept,
            sum(count for _, count, _ in found),
            sum(size for _, _, size in found),
        )
        for (name, shape, dtype, kept), found in layers.items()
    ]


def _in_order(reader: Reader) -> list[tuple[str, StoredTensor]]:
    """As the model declares them."""
    order = {name: place for place, name in enumerate(reader.manifest["tensors"])}
    return sorted(reader.tensors.items(), key=lambda item: order.get(item[0], len(order)))


def _state_of(name: str, known: tuple[str, ...]) -> tuple[str, str]:
    """(parameter, which of its ``known`` states) of a tensor; other tensors are their own."""
    state, _, parameter = name.partition("/")
    if state in known:
        return parameter, state
    table, _, last = name.rpartition(".")
    if name.startswith("engram.") and last in ("weight", *known):
        return f"{table}.weight", MASTER if last == "weight" else last
    return name, ""


def _pack(
    states: dict[Tensor, list[str]],
) -> Iterable[tuple[str, str, str, tuple[str, ...], int, int]]:
    """(name, shape, dtype, states, tensors, bytes): packed parts of one parameter (in_proj's z, x,
    ...) as one.
    """
    groups: dict[tuple, list[tuple[str, tuple[int, ...], int]]] = defaultdict(list)
    for (name, shape, dtype, size), kept in states.items():
        whole, _, part = name.rpartition(".")
        is_part = whole.endswith(("weight", "bias"))
        groups[whole if is_part else name, shape[1:], dtype, tuple(kept)].append(
            (part * is_part, shape, size)
        )
    for (name, inner, dtype, kept), parts in groups.items():
        rows = "+".join(str(shape[0]) for _, shape, _ in parts)
        names = ",".join(part for part, _, _ in parts)
        shown = name + (f".{{{names}}}" if len(parts) > 1 else f".{names}" * bool(names))
        total = sum(size for _, _, size in parts) * len(kept)
        yield (
            shown,
            f"[{', '.join([rows, *map(str, inner)])}]",
            dtype,
            kept,
            len(parts) * len(kept),
            total,
        )


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _dtype(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
