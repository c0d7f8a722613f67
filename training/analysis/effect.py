"""What memory does to the loss: the model with its table rows and with zeros instead, token by
token.

B batch, L length, S streams, T tokens, M memory width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from training.analysis.ngrams import NgramCounts, windows_of
from training.data.dataset import NO_TARGET, Batch, Rows
from training.engram.memory import EngramMemory, memory_of
from training.model.context import Memory, Recall
from training.model.engram import Engram
from training.model.model import HybridModel

LOGIT_TOKENS = 1024  # whose logits exist at once, per row of the batch
BINS = (0, 1, 2, 10, 100, 1000, 10_000)  # lower ends of the bins of n-gram frequency


@dataclass(frozen=True)
class Observed:
    """Every token that has a target, in the order of the text."""

    tokens_T: np.ndarray
    """int64 token ids, the inputs."""
    windows_TN: np.ndarray
    """Compressed n-grams that end at each token; what memory was looked up by."""
    loss_T: np.ndarray
    """fp32 cross-entropy of the next token, nats."""
    loss_without_T: np.ndarray
    """The same where all memory rows are zero."""
    gates: dict[int, np.ndarray]
    """layer -> (T, S) fp32, in the run with memory."""


@torch.no_grad()
def observe(
    model: HybridModel, memory: EngramMemory, rows: Rows, num_rows: int, micro_batch: int
) -> Observed:
    """Run the first ``num_rows`` of ``rows`` with and without the memory's rows. One process."""
    max_order = max(spec.max_order for spec in memory.hashes.values())
    parts: list[Observed] = []
    for start in range(0, num_rows, micro_batch):
        batch = Batch.stack(
            [rows.read(index) for index in range(start, min(start + micro_batch, num_rows))]
        )
        fetched = memory_of(memory.look_up(batch.input_ids_BL, batch.seq_idx_BL))
        with recorded_gates(model) as gates:
            loss_BL = token_losses(model, batch, fetched)
        kept_BL = batch.targets_BL != NO_TARGET
        parts.append(
            Observed(
                batch.input_ids_BL[kept_BL].numpy(),
                windows_of(batch, memory.token_map, max_order)[kept_BL.flatten().numpy()],
                loss_BL[kept_BL].numpy(),
                token_losses(model, batch, without_rows(fetched))[kept_BL].numpy(),
                {layer: gate_BLS[kept_BL].float().numpy() for layer, gate_BLS in gates.items()},
            )
        )
    return Observed(
        np.concatenate([part.tokens_T for part in parts]),
        np.concatenate([part.windows_TN for part in parts]),
        np.concatenate([part.loss_T for part in parts]),
        np.concatenate([part.loss_without_T for part in parts]),
        {layer: np.concatenate([part.gates[layer] for part in parts]) for layer in parts[0].gates},
    )


def without_rows(memory: Memory) -> Memory:
    """Memory of the same shapes that holds zeros."""

    def nothing(recall: Recall) -> tuple[torch.Tensor, torch.Tensor | None]:
        memory_BLM, masked_BL = recall()
        return torch.zeros_like(memory_BLM), masked_BL

    return {layer: partial(nothing, recall) for layer, recall in memory.items()}


def token_losses(model: HybridModel, batch: Batch, memory: Memory) -> torch.Tensor:
    """(B, L) fp32 cross-entropies; 0 where there is no target."""
    h_BLD, _ = model.hidden(batch.input_ids_BL, batch.seq_idx_BL, memory)
    pieces = [
        F.cross_entropy(
            model.head.logits(h).flatten(0, 1),
            targets.flatten(),
            ignore_index=NO_TARGET,
            reduction="none",
        ).view(targets.shape)
        for h, targets in zip(
            h_BLD.split(LOGIT_TOKENS, 1), batch.targets_BL.split(LOGIT_TOKENS, 1), strict=True
        )
    ]
    return torch.cat(pieces, 1)


@contextmanager
def recorded_gates(model: HybridModel) -> Iterator[dict[int, torch.Tensor]]:
    """layer -> (B, L, S) gates of the forwards inside, the newest of each layer."""
    gates: dict[int, torch.Tensor] = {}

    def watch(index: int):
        def record(layer: Engram, inputs: tuple) -> None:
            h_BLSD, memory_BLM = inputs[:2]
            gates[index] = layer.gated(h_BLSD, memory_BLM)[1].detach()

        return record

    engrams = {
        index: layer.engram
        for index, layer in enumerate(model.layers)
        if isinstance(layer.engram, Engram)
    }
    handles = [engram.register_forward_pre_hook(watch(index)) for index, engram in engrams.items()]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What the rows do for some tokens."""

    tokens: int
    loss: float
    loss_without: float
    """Mean loss in nats a token where all rows are zero."""
    gain: float
    """loss_without - loss, nats a token."""
    gain_error: float
    """Standard error of that mean, as if tokens were independent."""
    gates: dict[int, float]
    """layer -> mean gate over tokens and streams."""


@dataclass(frozen=True, kw_only=True)
class FrequencyBin:
    """The effect on tokens whose n-gram occurs about equally often in the counted text."""

    order: int
    low: int
    """The least number of occurrences in the training text."""
    high: int | None
    """The greatest; None is no limit."""
    effect: Effect


def effect_by_frequency(
    observed: Observed, counts: NgramCounts, bins: Sequence[int] = BINS
) -> list[FrequencyBin]:
    """The effect on the tokens whose suffix n-gram falls into each bin, for every order; empty bins
    are left out.
    """
    result = []
    for order in counts.levels:
        place_T = (
            np.searchsorted(bins, counts.frequency(observed.windows_TN, order), side="right") - 1
        )
        for place, low in enumerate(bins):
            if (mine := place_T == place).any():
                high = bins[place + 1] - 1 if place + 1 < len(bins) else None
                result.append(
                    FrequencyBin(
                        order=order,
                        low=low,
                        high=high,
                        effect=effect_on(observed, mine),
                    )
                )
    return result


def effect_on(observed: Observed, mine_T: np.ndarray) -> Effect:
    """The effect on the chosen tokens (bool)."""
    loss, without = (
        x[mine_T].astype(np.float64) for x in (observed.loss_T, observed.loss_without_T)
    )
    return Effect(
        tokens=len(loss),
        loss=float(loss.mean()),
        loss_without=float(without.mean()),
        gain=float((without - loss).mean()),
        gain_error=float((without - loss).std() / len(loss) ** 0.5),
        gates={layer: float(gate_TS[mine_T].mean()) for layer, gate_TS in observed.gates.items()},
    )
