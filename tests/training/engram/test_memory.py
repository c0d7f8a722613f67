"""The way from tokens to their memory rows; rows that move ahead of their use make the same run,
bit for bit, as rows that are fetched when needed.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.engram_hash import engram_hash
from kernels.engram_hash.reference import engram_hash_reference
from parallel.engram_table import tables as table_module
from parallel.errors import RunError
from parallel.mesh import single_mesh
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import VOCAB, layout, made_up_rows, make_trainer, tiny_config
from tests.parity import quiet_libraries
from tests.training.engram.memories import real_memory
from training.data.dataset import Batch
from training.data.token_map import TokenMap
from training.engram.memory import EngramMemory, memory_of
from training.model.config import EngramConfig
from training.step import train_step

STEPS = 50
LENGTH = 24


def repeating_batches(step: int, rank: int, num_micro: int) -> list[Batch]:
    """The same few n-grams in every step and on every rank: each step updates rows that the next
    one has fetched.
    """
    batches = []
    for micro in range(num_micro):
        generator = torch.Generator().manual_seed(1000 * (step // 2) + 10 * micro + rank)
        phrase = torch.randint(3, 9, (1, 6), generator=generator)
        ids_BL = phrase.repeat(2, 1 + LENGTH // 6)
        documents_BL = torch.zeros(2, LENGTH, dtype=torch.int32)
        batches.append(
            Batch(
                ids_BL[:, :LENGTH],
                ids_BL[:, 1 : LENGTH + 1],
                documents_BL,
                2 * LENGTH,
            )
        )
    return batches


def run(prefetch: int, ranks: int, num_micro: int, table: dict) -> dict:
    """Losses, norms and the whole table of a run."""
    quiet_libraries()
    engram = EngramConfig(
        layers=(0, 1),
        num_heads=2,
        head_dim=8,
        table_size=50,
        init_std=0.5,
    )
    config = tiny_config(pattern="M-", engram=engram)
    train = replace(config.train, micro_batch=2, global_batch=2 * num_micro * ranks)
    config = replace(
        config,
        train=train,
        table=replace(config.table, prefetch=prefetch, **table),
        parallel=layout(),
    )
    trainer = make_trainer(config)
    rank = trainer.mesh.rank("batch")
    figures = []
    coming = repeating_batches(0, rank, num_micro)
    for step in range(STEPS):
        batches = coming
        coming = repeating_batches(step + 1, rank, num_micro)
        result = train_step(
            trainer,
            batches,
            3e-3,
            step,
            list if step == STEPS - 1 else lambda coming=coming: coming,
        )
        figures.append((result.loss, result.grad_norm))
        assert trainer.memory.num_coming == (0 if step == STEPS - 1 else min(prefetch, num_micro))
    state = trainer.memory.tables.state()
    return {
        "figures": figures,
        "state": {name: piece.tensor.float().numpy() for name, piece in state.items()},
    }


def same(one: dict, other: dict) -> bool:
    states = one["state"], other["state"]
    return one["figures"] == other["figures"] and all(
        np.array_equal(states[0][n], states[1][n]) for n in states[0]
    )


@pytest.mark.parametrize(
    ("depth", "ranks", "num_micro", "table"),
    [
        (1, 1, 1, {}),
        (3, 1, 2, {"rows": "bf16", "optimizer": "rowwise_adam"}),
        (1, 2, 1, {}),
        (2, 2, 2, {"optimizer": "momentum_sinkhorn"}),
    ],
)
def test_prefetched_is_synchronous_bit_for_bit(depth, ranks, num_micro, table):
    synchronous = run_ranks(run, ranks, 0, ranks, num_micro, table)
    ahead = run_ranks(run, ranks, depth, ranks, num_micro, table)
    assert all(same(one, other) for one, other in zip(synchronous, ahead, strict=True))


def stale_run() -> dict:
    """A run whose steps do not patch what has been fetched ahead."""

    def nothing(changed_U, read, route, mesh):
        return torch.empty(0, dtype=torch.int64), read(torch.empty(0, dtype=torch.int64))

    table_module.resend = nothing
    return run(1, 1, 1, {})


def test_without_patches_the_run_would_be_another():
    (stale,) = run_ranks(stale_run, 1)
    (synchronous,) = run_ranks(run, 1, 0, 1, 1, {})
    assert stale["figures"][0] == synchronous["figures"][0]
    assert not same(stale, synchronous)


@pytest.mark.parametrize("orders", [(2, 3), (2, 3, 4)])
def test_row_ids_are_the_hash_of_compressed_ids_within_documents(orders):
    memory = real_memory(orders=orders)
    ids_BL, _, seq_idx_BL = made_up_rows(0)
    rows = memory.row_ids(ids_BL, seq_idx_BL)
    assert set(rows) == {1, 3}
    for layer, ids_BLO in rows.items():
        expected = engram_hash_reference(ids_BL % 150, memory.hashes[layer], seq_idx_BL)
        assert torch.equal(ids_BLO, expected)
    assert not torch.equal(rows[1], rows[3])


def test_row_ids_of_decoding_are_those_of_the_whole_text():
    """A new token is hashed with the compressed ids before it, and with pads where the text is
    younger.
    """
    memory = real_memory(orders=(2, 3, 4))
    ids_BL = torch.randint(0, VOCAB, (2, 12))
    whole = memory.row_ids(ids_BL, None)
    compressed = memory.token_map.compress(ids_BL)
    for layer, spec in memory.hashes.items():
        padded = torch.cat([torch.full((2, 3), spec.pad_id), compressed], 1)
        for t in range(12):
            step = engram_hash(compressed[:, t : t + 1], spec, history_BK=padded[:, t : t + 3])
            assert torch.equal(step[:, 0], whole[layer][:, t])


def test_uncompressed_ids_hash_as_they_are():
    config = tiny_config().model.engram
    token_map = TokenMap(ids=torch.arange(VOCAB), num_compressed=VOCAB, pad_id=5)
    memory = EngramMemory(
        config,
        token_map,
        real_memory().tables,
        single_mesh(),
    )
    ids_BL, _, seq_idx_BL = made_up_rows(1)
    expected = engram_hash_reference(ids_BL, memory.hashes[3], seq_idx_BL)
    assert torch.equal(memory.row_ids(ids_BL, seq_idx_BL)[3], expected)


def test_memory_holds_the_rows_in_column_order():
    memory = real_memory()
    ids_BL, _, seq_idx_BL = made_up_rows(2)
    rows = memory.look_up(ids_BL, seq_idx_BL)
    row_ids = memory.row_ids(ids_BL, seq_idx_BL)
    for layer, recall in memory_of(rows).items():
        e_BLM, masked_BL = recall()
        assert masked_BL is None
        assert e_BLM.shape == (*ids_BL.shape, row_ids[layer].shape[-1] * 8)
        single = memory.tables.fetch({key: ids[3:4, 7:8, 2:3] for key, ids in row_ids.items()})[
            layer
        ].embed()
        assert torch.equal(e_BLM[3, 7, 16:24], single.flatten())
        assert torch.equal(recall()[0], e_BLM)
    assert float(e_BLM.detach().std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("token", "error", "told"),
    [
        (VOCAB, RunError, f"token id={VOCAB} is outside the token map of {VOCAB} tokens"),
        (10**9, RunError, f"token id={10**9} is outside the token map of {VOCAB} tokens"),
        (-2, ValueError, "got id -2, expected -1"),
    ],
)
def test_ids_outside_the_vocabulary_are_an_error(token, error, told):
    """None is wrapped round, clamped or hashed; nor is one below -1, which would count from a
    table's end.
    """
    memory = real_memory()
    ids_BL, _, documents_BL = made_up_rows(0)
    ids_BL[2, 7] = token
    with pytest.raises(error, match=told):
        memory.look_up(ids_BL, documents_BL)[1].embed()


def test_a_token_map_larger_than_the_hash_is_an_error():
    memory = real_memory()
    memory.token_map = TokenMap(ids=torch.arange(VOCAB), num_compressed=VOCAB, pad_id=0)
    with pytest.raises(
        ValueError, match=r"got id 180, expected -1 .masked. to vocab_size - 1 = 149"
    ):
        memory.row_ids(torch.full((1, 4), 180), None)
