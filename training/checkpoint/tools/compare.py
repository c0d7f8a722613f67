"""How two checkpoints differ: in what they hold, tensor by tensor in values, and in their
configurations.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.checkpoint.tools.reader import Reader, StoredTensor
from training.checkpoint.tools.sidecar_files import sidecar_files

Track = Callable[[Sequence[str]], Iterable[str]]
MISSING = "missing"


@dataclass(frozen=True)
class ValueDifference:
    """A tensor that both hold, with other values."""

    name: str
    max_abs: float
    relative_rmse: float
    """||B - A|| / ||A|| in fp64; infinite where A is zero, NaN where either holds one."""
    num_different: int
    num_elements: int


@dataclass
class Difference:
    """All that differs between the checkpoints A and B."""

    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    kinds: list[tuple[str, str, str]] = field(default_factory=list)
    """(name, dtype and shape in A, in B) of tensors whose values cannot be compared."""
    values: list[ValueDifference] = field(default_factory=list)
    """Tensors whose values differ, the worst first."""
    num_identical: int = 0
    fields: list[tuple[str, Any, Any]] = field(default_factory=list)
    """(field, value in A, value in B) of manifests and run configurations."""

    @property
    def same(self) -> bool:
        """Whether the two checkpoints differ in nothing."""
        return not (self.only_in_a or self.only_in_b or self.kinds or self.values or self.fields)


def compare(path_a: Path, path_b: Path, track: Track = lambda names: names) -> Difference:
    """Compare two checkpoints in boxes of at most 8 MiB, so that neither has to fit into memory.

    Raises:
        RunError: one of them is no complete checkpoint, or damaged.
    """
    a = Reader(path_a)
    b = Reader(path_b)
    difference = Difference(
        only_in_a=sorted(a.tensors.keys() - b.tensors.keys()),
        only_in_b=sorted(b.tensors.keys() - a.tensors.keys()),
        fields=_field_differences(a, b),
    )
    for name in track([name for name in a.tensors if name in b.tensors]):
        kinds = _kind(a.tensors[name]), _kind(b.tensors[name])
        if kinds[0] != kinds[1]:
            difference.kinds.append((name, *kinds))
        elif (found := _compare_values(name, a, b)) is not None:
            difference.values.append(found)
        else:
            difference.num_identical += 1
    difference.values.sort(
        key=lambda d: (not math.isnan(d.relative_rmse), -d.relative_rmse, -d.max_abs, d.name)
    )
    return difference


def _kind(tensor: StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _compare_values(name: str, a: Reader, b: Reader) -> ValueDifference | None:
    """None where all bits agree."""
    max_abs = squares = norm = 0.0
    num_different = 0
    for box in a.boxes(name):
        mine = a.read(name, box)
        other = b.read(name, box)
        norm += float(mine.double().square().sum())
        different = (
            mine.view(torch.uint8)
            .ne(other.view(torch.uint8))
            .unflatten(-1, (-1, mine.itemsize))
            .any(-1)
        )
        if different.any():
            num_different += int(different.sum())
            gap = (other.double() - mine.double())[different].abs()
            # Not max(): that of Python forgets a NaN.
            max_abs = float(torch.tensor([max_abs, float(gap.max())], dtype=torch.float64).max())
            squares += float(gap.square().sum())
    if not num_different:
        return None
    relative = math.sqrt(squares / norm) if norm else squares and squares * math.inf
    return ValueDifference(
        name,
        max_abs,
        relative,
        num_different,
        math.prod(a.tensors[name].shape),
    )


def _field_differences(a: Reader, b: Reader) -> list[tuple[str, Any, Any]]:
    fields_a = _fields(a)
    fields_b = _fields(b)
    return [
        (name, fields_a.get(name, MISSING), fields_b.get(name, MISSING))
        for name in {**fields_a, **fields_b}
        if fields_a.get(name, MISSING) != fields_b.get(name, MISSING)
    ]


def _fields(reader: Reader) -> dict[str, Any]:
    """Step, layout, model and hash of a checkpoint, and the rest of its run's configuration where
    that lies beside.
    """
    manifest = reader.manifest
    run_json = sidecar_files(reader.path).get("run.json")
    told = {
        key: manifest.get(key)
        for key in ("step", "format", "layout", "model", "token_map", "hashes")
    }
    if run_json is not None:
        config = json.loads(run_json.read_text()).get("config", {})
        told["run"] = {key: value for key, value in config.items() if key != "model"}
    return flatten(told)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat
