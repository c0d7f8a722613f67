"""Whether a checkpoint is of this model: its configuration, its tensors, and what its Engram rows
mean.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel.errors import Problem, RunError
from training.checkpoint.format.logical import Tensors
from training.checkpoint.format.problems import checkpoint_problem
from training.checkpoint.format.storage import Manifest
from training.checkpoint.format.stored_rows import TensorMetadata
from training.engram.memory import EngramMemory
from training.model.config import ModelConfig
from training.model.layer_table import LAYERS

# Fields that may change in a resumed run: the function that the parameters describe stays the same.
FREE_FIELDS = {
    "init_std",
    "engram.init_std",
    "mamba2.chunk_size",
    "moe.bias_rate",
    "moe.aux_loss",
    "moe.z_loss",
    "moe.capacity_factor",
}
MAX_LISTED = 20


def metadata_of(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """Name -> shape and dtype, as JSON holds them."""
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def identity_of(config: ModelConfig, memory: EngramMemory | None) -> dict[str, Any]:
    """What parameters and rows mean: the model's configuration, the token map and the hashes."""
    identity: dict[str, Any] = {
        "model": json.loads(json.dumps(asdict(config))),
        "token_map": None,
        "hashes": None,
    }
    if memory is not None:
        hashes = json.dumps(
            {layer: asdict(spec) for layer, spec in sorted(memory.hashes.items())}, default=int
        )
        identity["token_map"] = memory.token_map.checksum
        identity["hashes"] = hashlib.sha256(hashes.encode()).hexdigest()
    return identity


def require_same_model(
    path: Path,
    manifest: Manifest,
    tensors: Tensors,
    config: ModelConfig,
    memory: EngramMemory | None,
    stored: TensorMetadata,
) -> None:
    """Raise RunError with everything that differs between the checkpoint and the model that asks
    for it.
    """
    identity = identity_of(config, memory)
    problems = model_problems(path, manifest, config)
    problems += _tensor_problems(path, metadata_of(tensors), stored)
    for key, name in (("token_map", "token map"), ("hashes", "Engram hashes")):
        if not problems and identity[key] != manifest[key]:
            rule = f"is not the one of {path} ({manifest[key]}): its rows would be noise"
            fix = "use the token files and Engram settings that the run was trained with"
            problems.append(
                Problem(
                    field=name,
                    value=identity[key],
                    rule=rule,
                    fix=fix,
                )
            )
    if problems:
        raise RunError(*problems)


def model_problems(path: Path, manifest: Manifest, config: ModelConfig) -> list[Problem]:
    """The fields that make another function of the model than the checkpoint's."""
    here = identity_of(config, None)["model"]
    return [
        Problem(
            field=f"model.{name}",
            value=mine,
            rule=f"is {theirs} in {path}",
            fix="use the checkpoint's value",
        )
        for name, mine, theirs in _config_differences(here, manifest["model"])
    ]


def _config_differences(here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, value here, value there) for fields that both know and that change the model's
    function.
    """
    letters = here["pattern"] + there["pattern"]
    used = {kind.config for letter, kind in LAYERS.items() if letter in letters}
    unused = {kind.config for kind in LAYERS.values()} - used
    mine = _flat(here)
    other = _flat(there)
    return [
        (name, mine[name], other[name])
        for name in mine
        if name in other and mine[name] != other[name]
        if name not in FREE_FIELDS and name.partition(".")[0] not in unused
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def _tensor_problems(path: Path, here: TensorMetadata, there: TensorMetadata) -> list[Problem]:
    lines = [f"{name} is not in it" for name in here if name not in there]
    lines += [f"{name} is in it and not in this model" for name in there if name not in here]
    for name in here.keys() & there.keys():
        if here[name] != there[name]:
            there_is, here_is = (
                f"{record['dtype']} {record['shape']}" for record in (there[name], here[name])
            )
            lines.append(f"{name} is {there_is} in it and {here_is} here")
    if not lines:
        return []
    listed = "; ".join(sorted(lines)[:MAX_LISTED])
    more = f"; and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    rule = f"holds another model: {listed}{more}"
    error = checkpoint_problem(path, rule, "use its run.json")
    return [problem for problem in error.problems if isinstance(problem, Problem)]
