"""Training without DeepSpeed and processes, in fp32 or in fp64: what the runs of other tests are
measured by.

Two runs in fp32 differ by rounding, and by how much depends on the CPU: its vectors add in another
order. So neither is the truth; the same run in fp64 is. What rounding may do to a run is then
measured, too, not guessed.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from parallel.engram_table import Rows
from parallel.mesh import single_mesh
from parallel.placement import placed_parameters
from tests.helpers.table_use import touched_gradients
from tests.helpers.tiny import made_up_batches, made_up_token_map
from training.config import RunConfig
from training.engram.memory import EngramMemory, build_memory
from training.model.context import Memory
from training.model.model import HybridModel, build_model
from training.model.moe import expert_loads, update_balance

CPU = torch.device("cpu")


# Runs that measure what rounding does: one alone may be near the truth by luck.
NUM_DRAWS = 4
EPS = torch.finfo(torch.float32).eps


def plain_model(config: RunConfig, dtype: torch.dtype = torch.float32) -> HybridModel:
    """The model without processes, from fp32 initial values."""
    return build_model(
        config.model,
        single_mesh(),
        seed=config.train.seed,
        dtype=dtype,
        device=CPU,
    )


def move(model: nn.Module, draw: int) -> None:
    """Change every value of a model by up to one fp32 rounding; draw 0 changes nothing."""
    generator = torch.Generator().manual_seed(draw)
    for parameter in model.parameters() if draw else ():
        parameter.data *= 1 + EPS * (2 * torch.rand(parameter.shape, generator=generator) - 1)


def plain_adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """The optimizer that DeepSpeed shards."""
    settings = config.optimizer
    groups = []
    for decay in (True, False):
        members = [p for _, p in placed_parameters(model) if p.placement.decay == decay]
        groups.append({"params": members, "weight_decay": settings.weight_decay if decay else 0.0})
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
    )


def train_plainly(
    config: RunConfig, num_steps: int, dtype: torch.dtype = torch.float32, draw: int = 0
) -> dict[str, Any]:
    """The reference of the references: no process group, one micro-batch, torch's clipping.

    In fp64 all but the table's rows is computed in fp64, from the same fp32 initial values.

    Args:
        draw: of the initial values, see ``move``.

    Returns:
        Figures of each step, and tensors by kind and name, as ``tests.parity.run_case`` has them.
    """
    model = plain_model(config, dtype)
    move(model, draw)
    model.to(dtype)  # what is declared fp32, too
    memory = build_memory(
        config,
        single_mesh(),
        made_up_token_map(),
        CPU,
    )
    optimizer = plain_adamw(model, config)
    figures = []
    gradients = []
    initial = {name: parameter.detach().clone() for name, parameter in placed_parameters(model)}
    with wide_floats():
        for step in range(num_steps):
            loss = accumulate(model, memory, config, step)
            gradients.append(gradients_of(model, memory))
            norm = update(model, memory, optimizer, config)
            figures.append((loss, norm))
    parameters = {name: parameter.detach() for name, parameter in placed_parameters(model)}
    return {
        "figures": figures,
        "first gradients": gradients[0],
        "last gradients": gradients[-1],
        "parameters": parameters,
        "updates": {name: parameters[name] - initial[name] for name in initial},
        "rows": {
            name: piece.tensor
            for name, piece in memory.tables.state().items()
            if name.endswith(".weight")
        },
    }


def accumulate(model: HybridModel, memory: EngramMemory, config: RunConfig, step: int) -> float:
    """Gradients of a step's mean loss, which is returned."""
    one_batch = replace(config, train=replace(config.train, micro_batch=config.train.global_batch))
    (batch,) = made_up_batches(step, one_batch, 0, 1)
    rows = memory.look_up(batch.input_ids_BL, batch.seq_idx_BL)
    dtype = model.embedding.weight.dtype
    cross_entropy, auxiliary = model(
        batch.input_ids_BL, batch.targets_BL, batch.seq_idx_BL, recall(rows, dtype)
    )
    ((cross_entropy + auxiliary) / batch.num_targets).backward()
    memory.tables.accumulate(rows)
    return float(cross_entropy.detach()) / batch.num_targets


def recall(rows: dict[int, Rows], dtype: torch.dtype) -> Memory:
    """Fetched rows as the model reads them."""
    return {
        layer: lambda row=row: (row.embed().to(dtype), row.masked()) for layer, row in rows.items()
    }


def gradients_of(model: HybridModel, memory: EngramMemory) -> dict[str, torch.Tensor]:
    """Copies of all gradients, those of whole tables included."""
    found = {name: parameter.grad.clone() for name, parameter in placed_parameters(model)}
    tables = memory.tables
    for layer, (rows_U, grad_UW) in touched_gradients(tables).items():
        whole = torch.zeros(tables.shapes[layer].num_rows, tables.width)
        found[f"engram.{layer}.weight"] = whole.index_copy_(0, rows_U, grad_UW)
    return found


def update(
    model: HybridModel, memory: EngramMemory, optimizer: torch.optim.Optimizer, config: RunConfig
) -> float:
    """Clip, step, balance the experts; the norm before clipping."""
    dense = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    norm = math.hypot(float(dense), float(memory.tables.squared_grad_norm().sqrt()))
    factor = min(1.0, config.optimizer.clip_norm / (norm + 1e-6))
    for parameter in model.parameters():
        parameter.grad.mul_(factor)
    optimizer.step()
    optimizer.zero_grad()
    memory.tables.step(config.optimizer.learning_rate, factor)
    update_balance(model, expert_loads(model), torch.tensor(True))
    return norm


@contextmanager
def wide_floats() -> Iterator[None]:
    """``Tensor.float`` leaves fp64 as it is: the model asks by it for fp32 at least."""

    def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    with mock.patch.object(torch.Tensor, "float", at_least_fp32):
        yield
