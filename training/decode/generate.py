"""Text from a model, token by token: the same forward as in training,
with the layers' states kept.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from kernels.engram_hash import engram_hash
from training.decode.loaded_model import load_model
from training.decode.state import start_sequences
from training.engram.memory import EngramMemory, memory_of
from training.model.model import HybridModel


def generate(
    run: Path, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """The prompt and its continuation by the newest checkpoint of a run, on this one process.

    Args:
        run: directory of a run, whatever the layout that trained it.
        max_tokens: tokens to add, at most; the end of the document stops earlier.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that hold this share of the probability.

    Raises:
        RunError: no complete checkpoint, or one of another model or tokenizer.
    """
    trained = load_model(run)
    known = trained.vocabulary
    tokenizer = known.tokenizer()
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [known.eod_id]
    sampler = torch.Generator().manual_seed(seed)
    added = continue_tokens(
        trained.model,
        trained.memory,
        ids,
        max_tokens,
        temperature,
        top_p,
        sampler,
        known.eod_id,
        known.vocab_size,
    )
    return tokenizer.decode(ids + added)


@torch.no_grad()
def continue_tokens(
    model: HybridModel,
    memory: EngramMemory | None,
    ids: list[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    sampler: torch.Generator,
    eod_id: int,
    vocab_size: int | None = None,
    agree: Callable[[int], int] | None = None,
) -> list[int]:
    """Sample up to ``max_tokens`` tokens after ``ids``, stopping at the end of the document.

    On several ranks they compute the same text together; there is no tensor parallelism (a token is
    not divided).

    Args:
        agree: what several ranks make of the token that each has drawn: the same on all.
        vocab_size: tokens that the tokenizer knows, where the model's vocabulary is larger.
    """
    state = start_sequences(model, num_sequences=1)
    device = model.norm.device
    tokens = list(ids)
    fed = 0
    while len(tokens) - len(ids) < max_tokens:
        new_BL = torch.tensor([tokens[fed:]])
        rows = {} if memory is None else memory.tables.fetch(_row_ids(memory, tokens, fed))
        logits_BLV = model.logits(
            new_BL.to(device),
            None,
            memory_of(rows),
            state,
        )
        fed = len(tokens)
        token = sample(
            logits_BLV[0, -1, :vocab_size].cpu(),
            temperature,
            top_p,
            sampler,
        )
        if agree is not None:
            token = agree(token)
        if token == eod_id:
            break
        tokens.append(token)
    return tokens[len(ids) :]


def _row_ids(memory: EngramMemory, tokens: list[int], fed: int) -> dict[int, torch.Tensor]:
    """Row ids of the tokens from ``fed`` on: hashed with the few tokens before them."""
    rows = {}
    for layer, spec in memory.hashes.items():
        first = max(0, fed - spec.max_order + 1)
        compressed = memory.token_map.compress(torch.tensor([tokens[first:]]))
        rows[layer] = engram_hash(compressed, spec)[:, fed - first :]
    return rows


def sample(
    logits_V: torch.Tensor, temperature: float, top_p: float, sampler: torch.Generator
) -> int:
    """A token by nucleus sampling (arXiv 1904.09751); the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, order = torch.softmax(logits_V.double() / temperature, -1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return int(order[torch.multinomial(probabilities, 1, generator=sampler)])
