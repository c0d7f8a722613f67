"""Engram memory of a model: tokens to row ids, and the rows of this rank's share of the tokens.

B batch, L length, O n-gram orders x hash heads, Y Engram layers.
"""

from collections.abc import Mapping
from functools import partial

import torch

from kernels.engram_hash import NgramHash, engram_hash_layers, ngram_hashes
from parallel.engram_table import EngramTables, Rows, TableShape
from parallel.mesh import Mesh
from training.compute_dtype import DTYPES
from training.config import RunConfig
from training.data.dataset import Batch
from training.data.token_map import TokenMap, load_token_map
from training.data.vocabulary import Vocabulary
from training.model.config import EngramConfig
from training.model.context import Memory


class EngramMemory:
    """Hashes tokens into row ids and fetches the rows of this rank's share of the tokens."""

    def __init__(
        self, config: EngramConfig, token_map: TokenMap, tables: EngramTables, mesh: Mesh
    ) -> None:
        self.hashes = engram_hashes(config, token_map)
        self.tables = tables
        self.mesh = mesh
        self.token_map = token_map
        self._coming: list[tuple[Batch, dict[int, Rows]]] = []

    def row_ids(
        self, ids_BL: torch.Tensor, seq_idx_BL: torch.Tensor | None
    ) -> dict[int, torch.Tensor]:
        """(B, L / tp, O) int64 row ids of each layer for this tensor rank's tokens, on the host."""
        compressed = self.token_map.compress(ids_BL.cpu())
        rows_YBLO = engram_hash_layers(compressed, list(self.hashes.values()), seq_idx_BL)
        # Whole rows are hashed: the first n-grams of a share begin in the share before.
        length = ids_BL.shape[1] // self.mesh.size("tp")
        first = self.mesh.rank("tp") * length
        share_YBLO = rows_YBLO[:, :, first : first + length]
        return dict(zip(self.hashes, share_YBLO, strict=True))

    def look_up(self, ids_BL: torch.Tensor, seq_idx_BL: torch.Tensor | None) -> dict[int, Rows]:
        """The rows of these tokens; collective over ``engram``."""
        return self.tables.fetch(lambda: self.row_ids(ids_BL, seq_idx_BL))

    def prefetch(self, batch: Batch) -> None:
        """Send for the rows of a micro-batch that will be trained on later.

        Collective over ``engram``.
        """
        self._coming.append((batch, self.look_up(batch.input_ids_BL, batch.seq_idx_BL)))

    def rows_of(self, batch: Batch) -> dict[int, Rows]:
        """The rows of a micro-batch: those sent for earlier, in that order, or fetched now."""
        if self._coming and self._coming[0][0] is batch:
            return self._coming.pop(0)[1]
        return self.look_up(batch.input_ids_BL, batch.seq_idx_BL)

    @property
    def num_coming(self) -> int:
        """Micro-batches whose rows have been sent for and not been asked for."""
        return len(self._coming)


def engram_hashes(config: EngramConfig, token_map: TokenMap) -> dict[int, NgramHash]:
    """The hash of each Engram layer over a compressed vocabulary."""
    return ngram_hashes(
        config.layers,
        token_map.num_compressed,
        config.orders,
        config.num_heads,
        config.table_size,
        config.seed,
        token_map.pad_id,
    )


def memory_of(rows: Mapping[int, Rows]) -> Memory:
    """What the model reads: for each layer a function that puts the rows into the graph."""
    return {layer: partial(_recall, fetched) for layer, fetched in rows.items()}


def _recall(rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    return rows.embed(), rows.masked()


def run_token_map(config: RunConfig, files: Vocabulary) -> TokenMap:
    """The token map that Engram hashes through: the prepared one, or every token as it is."""
    if config.model.engram is None or config.model.engram.compress:
        return load_token_map(files.token_map_path, files.tokenizer_path)
    return TokenMap(
        ids=torch.arange(files.vocab_size), num_compressed=files.vocab_size, pad_id=files.pad_id
    )


def build_memory(
    config: RunConfig, mesh: Mesh, token_map: TokenMap, device: torch.device, trainable: bool = True
) -> EngramMemory | None:
    """The Engram tables of a run and the hash into them; None for a model without Engram.

    Args:
        trainable: False: rows to be loaded and looked up, without an optimizer.
    """
    engram = config.model.engram
    if engram is None:
        return None
    shapes = {
        layer: TableShape(spec.num_rows, engram.head_dim)
        for layer, spec in engram_hashes(engram, token_map).items()
    }
    tables = EngramTables(
        shapes,
        mesh,
        config.table,
        init_std=engram.init_std,
        seed=config.train.seed,
        device=device,
        dtype=DTYPES[config.train.chosen_dtype],
        trainable=trainable,
    )
    return EngramMemory(engram, token_map, tables, mesh)
