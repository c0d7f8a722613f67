"""Made-up rows of tokens, and the tiny model's memory, for what is measured on them."""

from dataclasses import replace

import numpy as np
import torch

from parallel.mesh import single_mesh
from tests.helpers.tiny import VOCAB, made_up_rows, made_up_token_map, tiny_config
from training.data.dataset import NO_TARGET, Batch, Row
from training.engram.memory import build_memory

LENGTH = 24


def batch(step: int = 0) -> Batch:
    """Made-up rows of a step as one batch."""
    ids, targets, documents = made_up_rows(step)
    return Batch(
        ids,
        targets,
        documents,
        int((targets != NO_TARGET).sum()),
    )


def tiny_memory(**fields):
    """The tiny model's memory and configuration, with these Engram fields."""
    config = tiny_config()
    config = replace(
        config, model=replace(config.model, engram=replace(config.model.engram, **fields))
    )
    return build_memory(
        config,
        single_mesh(),
        made_up_token_map(),
        torch.device("cpu"),
    ), config


class FewRows:
    """Rows of made-up tokens, in two documents each."""

    seq_length = LENGTH

    def read(self, index: int) -> Row:
        tokens = np.random.default_rng(index).zipf(1.3, LENGTH + 1) % VOCAB
        return Row(tokens, (np.arange(LENGTH + 1) > 9 + index).astype(np.int32), LENGTH + 1)
