"""Text from the model at the end of its training,
by the ranks and in the memory that trained it.
"""

import torch

from parallel.collectives import copy_from_first
from training.data.files import TokenFiles
from training.decode.generate import continue_tokens
from training.run.preemption import asked_to_stop
from training.trainer import Trainer

PROMPT = "def __init__(self"
SAMPLE_TOKENS = 120
TEMPERATURE = 0.7
TOP_P = 0.9


def sample_text(trainer: Trainer, files: TokenFiles) -> str | None:
    """A prompt and its continuation; None on a layout that cannot continue token by token.
    Collective over world.

    Tensor ranks share a row's tokens in expert and Engram layers: one token cannot be divided among
    them.
    """
    if trainer.mesh.size("tp") > 1:
        return None
    tokenizer = files.tokenizer()
    ids = tokenizer.encode(PROMPT, add_special_tokens=False).ids or [files.eod_id]
    drawn = torch.zeros(1, dtype=torch.int64, device=trainer.device)

    def agree(token: int) -> int:
        """Rank 0's token: rounding may differ between ranks. A signal ends the text."""
        drawn.fill_(files.eod_id if asked_to_stop() else token)
        copy_from_first(drawn, trainer.mesh.group("world"))
        return int(drawn)

    sampler = torch.Generator().manual_seed(0)
    added = continue_tokens(
        trainer.model,
        trainer.memory,
        ids,
        SAMPLE_TOKENS,
        TEMPERATURE,
        TOP_P,
        sampler,
        files.eod_id,
        files.vocab_size,
        agree,
    )
    return tokenizer.decode(ids + added)
