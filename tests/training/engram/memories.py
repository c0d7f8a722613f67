"""The memory of the tiny model, with what a test changes of it."""

from dataclasses import replace

import torch

from parallel.mesh import single_mesh
from tests.helpers.tiny import made_up_token_map, tiny_config
from training.engram.memory import EngramMemory, build_memory


def real_memory(**fields) -> EngramMemory:
    """Memory of the tiny model with tables, and with these Engram fields."""
    config = tiny_config()
    config = replace(
        config, model=replace(config.model, engram=replace(config.model.engram, **fields))
    )
    return build_memory(
        config,
        single_mesh(),
        made_up_token_map(),
        torch.device("cpu"),
    )
