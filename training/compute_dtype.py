"""The compute type of a run: the one that was given, or what its device does well. Chosen once,
before all else.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.cpu_dtype import DtypeChoice
from parallel.collectives import copy_from_first
from parallel.device import choose_dtype
from training.config import Dtype, RunConfig
from training.run_file import load_run_json

DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def name_of(choice: DtypeChoice) -> Dtype:
    """The configuration's name of what was chosen."""
    return "bf16" if choice.dtype == torch.bfloat16 else "fp32"


def with_dtype(config: RunConfig, dtype: Dtype) -> RunConfig:
    """``config`` with this compute type."""
    return replace(config, train=replace(config.train, dtype=dtype))


def agree_on_dtype(
    config: RunConfig, device: torch.device, resumed: Path | None = None
) -> RunConfig:
    """``config`` with its compute type: the one given, else the resumed run's, else what rank 0's
    device does well.

    Rank 0 prints which, and why. Collective: all ranks must have the same ``config``.

    Args:
        resumed: run.json of the run that goes on.
    """
    given = config.train.dtype
    if given is None and resumed is not None:
        given = load_run_json(resumed).train.dtype
    names = list(DTYPES)
    chosen = torch.tensor(-1)  # a place in names
    if dist.get_rank() == 0:
        choice = choose_dtype(device)
        print(tell_choice(given, choice), flush=True)
        dtype = given or name_of(choice)
        chosen.fill_(names.index(dtype))
    copy_from_first(chosen, dist.group.WORLD)
    return with_dtype(config, names[int(chosen)])


def tell_choice(given: Dtype | None, choice: DtypeChoice) -> str:
    """The line that says which compute type is used and why, and when fp32 would be quicker than
    what was given.
    """
    best = name_of(choice)
    if given is None:
        return f"compute type {best}: {choice.reason}"
    if given == "bf16" and best == "fp32":
        return (
            f"compute type bf16: train.dtype says so; fp32 would be quicker here: {choice.reason}"
        )
    return f"compute type {given}: train.dtype says so"


def dtype_to_read_with(config: RunConfig, device: torch.device) -> Dtype:
    """The compute type for a trained model on ``device``: the run's, but fp32 where the device is
    slow in bf16.

    Weights are stored in fp32: nothing is lost by either.
    """
    best = name_of(choose_dtype(device))
    return best if config.train.dtype in (None, best) else "fp32"
