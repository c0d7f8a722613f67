"""One optimizer step: what a plain loop computes, a mean over all targets, and nothing where it is
not finite.
"""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from parallel.engram_table import Rows
from parallel.errors import RunError
from parallel.mesh import single_mesh
from parallel.placement import placed_parameters
from tests.helpers.compare import assert_close
from tests.helpers.exact import CPU, plain_model, train_plainly
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, made_up_batches, made_up_token_map, make_trainer, tiny_config
from tests.parity import STEPS, plain_run, quiet_libraries, reference_run
from training.config import RunConfig
from training.data.dataset import Batch
from training.engram.memory import build_memory, memory_of
from training.step import train_step
from training.trainer import Trainer


def test_one_rank_equals_a_plain_loop():
    expected = train_plainly(plain_run(), STEPS)
    got = reference_run("plain")
    np.testing.assert_allclose(got["figures"], expected["figures"], rtol=1e-5)
    for kind in ("parameters", "rows"):
        assert got[kind].keys() == expected[kind].keys()
        for name, values in expected[kind].items():
            assert_close(name, got[kind][name], values, 1e-5)


# --- the mean over targets ---


def masked_batches(config: RunConfig, rank: int, num_ranks: int, empty: bool) -> list[Batch]:
    """Rank 0 keeps all targets, each other rank three, or none."""
    batches = made_up_batches(0, config, rank, num_ranks)
    if rank == 0 and not empty:
        return batches
    masked = []
    for batch in batches:
        targets_BL = batch.targets_BL.clone()
        targets_BL[:, 0 if empty else 3 :] = -100
        masked.append(
            Batch(
                batch.input_ids_BL,
                targets_BL,
                batch.seq_idx_BL,
                int((targets_BL != -100).sum()),
            )
        )
    return masked


def uneven_step(config: RunConfig, empty: bool) -> tuple[float, float]:
    quiet_libraries()
    trainer = make_trainer(config)
    batches = masked_batches(
        config,
        trainer.mesh.rank("batch"),
        trainer.mesh.size("batch"),
        empty,
    )
    result = train_step(trainer, batches, 1e-3, 0)
    return result.loss, result.grad_norm


def without_auxiliary() -> RunConfig:
    """The gradient is that of the cross-entropy alone; clipping off."""
    config = tiny_config()
    moe = replace(config.model.moe, aux_loss=0.0, z_loss=0.0)
    optimizer = replace(config.optimizer, clip_norm=0.0)
    return replace(config, model=replace(config.model, moe=moe), optimizer=optimizer)


@pytest.mark.parametrize("parallel", [{}, {"ep": 2, "zero_stage": 2}])
def test_loss_is_the_mean_over_all_ranks_targets(parallel):
    config = without_auxiliary()
    everyone = [batch for rank in range(2) for batch in masked_batches(config, rank, 2, False)]
    model = plain_model(config)
    memory = build_memory(
        config,
        single_mesh(),
        made_up_token_map(),
        CPU,
    )
    total = torch.zeros(())
    count = sum(batch.num_targets for batch in everyone)
    for batch in everyone:
        rows = memory.look_up(batch.input_ids_BL, batch.seq_idx_BL)
        loss, _ = model(
            batch.input_ids_BL,
            batch.targets_BL,
            batch.seq_idx_BL,
            memory_of(rows),
        )
        (loss / count).backward()
        memory.tables.accumulate(rows)
        total += loss.detach()
    squared = (
        sum(p.grad.double().square().sum() for p in model.parameters())
        + memory.tables.squared_grad_norm()
    )
    config = replace(config, parallel=layout(**parallel))
    for found, norm in run_ranks(uneven_step, 2, config, False):
        assert found == pytest.approx(float(total) / count, rel=1e-6)
        assert norm == pytest.approx(math.sqrt(squared), rel=1e-5)


def test_a_step_without_targets_has_no_loss_and_no_gradient():
    assert run_ranks(uneven_step, 2, without_auxiliary(), True) == [(0.0, 0.0)] * 2


# --- not finite ---


def everything(trainer: Trainer) -> dict[str, np.ndarray]:
    """All that a step may change on this rank: parameters, masters, moments, biases, rows and their
    moments.
    """
    tensors = dict(trainer.model.state_dict())
    for index, (_, start, master, states) in enumerate(trainer.engine.state_fragments()):
        live = {"master": master} | dict(states)
        tensors |= {f"{index}/{start}/{name}": values for name, values in live.items()}
    for index, group in enumerate(trainer.engine.group_states()):
        tensors[f"{index}/step"] = group.scalars["step"]
    tensors |= {name: piece.tensor for name, piece in trainer.memory.tables.state().items()}
    return {name: tensor.detach().float().numpy().copy() for name, tensor in tensors.items()}


def spoil(trainer: Trainer, fault: str, rank: int) -> None:
    """Make one thing on one rank not finite in the next step."""
    if trainer.mesh.rank("world") != rank:
        return
    if fault == "table row":
        take = Rows.take_gradient
        mock.patch.object(Rows, "take_gradient", lambda rows: take(rows).fill_(math.inf)).start()
        return
    parameter = dict(placed_parameters(trainer.model))[fault]
    parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan))


def stopped_step(config: RunConfig, fault: str, rank: int) -> tuple[str, list[str]]:
    """The error of the second step, and the names of what it changed all the same."""
    quiet_libraries()
    trainer = make_trainer(config)
    mine = trainer.mesh.rank("batch")
    ranks = trainer.mesh.size("batch")
    train_step(
        trainer,
        made_up_batches(0, config, mine, ranks),
        1e-2,
        6,
    )
    spoil(trainer, fault, rank)
    before = everything(trainer)
    with pytest.raises(RunError) as error:
        train_step(
            trainer,
            made_up_batches(1, config, mine, ranks),
            1e-2,
            7,
        )
    after = everything(trainer)
    return str(error.value), [
        name for name in before if not np.array_equal(before[name], after[name])
    ]


# On tensor rank 1 the shard is the second rank's own; over data ranks the owner of the reduced
# gradient names it.
FAULTS = [
    (2, {"tp": 2}, "layers.0.mixer.A_log", 1, "rank 1, gradient of layers.0.mixer.A_log"),
    (
        2,
        {"tp": 2, "ep": 2},
        "layers.1.mixer.experts.down",
        1,
        "rank 1, gradient of layers.1.mixer.experts.down",
    ),
    (2, {"zero_stage": 2}, "norm", 1, "gradient of norm"),
    (2, {"tp": 2}, "table row", 1, "an Engram table row"),
    (1, {}, "layers.3.engram.key", 0, "rank 0, gradient of layers.3.engram.key"),
]


@pytest.mark.parametrize(("size", "parallel", "fault", "rank", "where"), FAULTS)
def test_a_gradient_that_is_not_finite_stops_before_the_update(size, parallel, fault, rank, where):
    found = run_ranks(
        stopped_step, size, replace(tiny_config(), parallel=layout(**parallel)), fault, rank
    )
    assert len({message for message, _ in found}) == 1, "every rank tells the same"
    message, _ = found[0]
    assert message.startswith("step 7: loss ")
    assert "not finite, first on" in message
    assert where in message
    assert "Nothing was updated" in message
    assert [changed for _, changed in found] == [[]] * size


def stopped_by_loss(config: RunConfig) -> tuple[str, list[str]]:
    quiet_libraries()
    trainer = make_trainer(config)
    if trainer.mesh.rank("batch") == 1:
        trainer.model.layers[0].mixer.register_forward_hook(
            lambda mixer, inputs, outputs: (outputs[0] * math.inf, outputs[1])
        )
    before = everything(trainer)
    with pytest.raises(RunError) as error:
        train_step(
            trainer,
            made_up_batches(
                0,
                config,
                trainer.mesh.rank("batch"),
                trainer.mesh.size("batch"),
            ),
            1e-2,
            0,
        )
    after = everything(trainer)
    unequal = [
        name for name in before if not np.array_equal(before[name], after[name], equal_nan=True)
    ]
    return str(error.value), unequal


def test_a_loss_that_is_not_finite_on_one_rank_stops_all():
    for message, changed in run_ranks(
        stopped_by_loss, 2, replace(tiny_config(), parallel=layout(ep=2))
    ):
        assert message.startswith(
            "step 0: loss nan, gradient norm nan: not finite, first on rank 0, gradient of "
        )
        assert changed == []


# --- bf16 ---


def bf16_losses(config: RunConfig, num_steps: int) -> list[tuple[float, float]]:
    quiet_libraries()
    trainer = make_trainer(config)
    batches = made_up_batches(
        0,
        config,
        trainer.mesh.rank("batch"),
        trainer.mesh.size("batch"),
    )
    results = [train_step(trainer, batches, 3e-3, step) for step in range(num_steps)]
    dtypes = {parameter.dtype for _, parameter in placed_parameters(trainer.model)}
    assert dtypes == {torch.bfloat16, torch.float32}
    for _, _, master, states in trainer.engine.state_fragments():
        assert {values.dtype for values in (master, *states.values())} == {torch.float32}
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [(1, {}), (2, {"tp": 2, "ep": 2, "sequence_parallel": True}), (2, {"ep": 2, "zero_stage": 2})],
)
def test_bf16_learns_a_batch_by_heart(size, parallel):
    config = tiny_config()
    config = replace(
        config,
        parallel=layout(**parallel),
        optimizer=replace(config.optimizer, clip_norm=1.0, eps=1e-8),
        train=replace(config.train, dtype="bf16"),
    )
    ranks = run_ranks(bf16_losses, size, config, 12)
    assert all(figures == ranks[0] for figures in ranks)
    losses = [loss for loss, _ in ranks[0]]
    assert losses[-1] < losses[0] - 1.0, losses


# --- figures ---


def one_step(config: RunConfig) -> tuple[float | None, float | None, float]:
    quiet_libraries()
    trainer = make_trainer(config)
    batches = made_up_batches(
        0,
        config,
        trainer.mesh.rank("batch"),
        trainer.mesh.size("batch"),
    )
    result = train_step(trainer, batches, 1e-3, 0)
    return result.expert_max, result.engram_work_s, result.exchange_s


def test_figures_of_what_a_model_has():
    expert_max, engram_s, exchange_s = run_ranks(
        one_step, 2, replace(tiny_config(), parallel=layout(ep=2))
    )[0]
    assert 1 <= expert_max <= 4  # of 4 experts
    assert engram_s > 0
    assert exchange_s > 0
    dense = tiny_config(pattern="M-", engram=None)
    assert run_ranks(one_step, 1, dense) == [(None, None, 0.0)]
