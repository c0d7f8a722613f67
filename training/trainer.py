"""Everything that one rank trains with, put together once: mesh, model, engine, Engram tables,
data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kernels.compiled import compile_pieces, compiler_problem
from parallel.engine.deepspeed import start_engine
from parallel.engine.optimizer_state import MakeOptimizer
from parallel.engine.protocol import Engine
from parallel.engram_table import Rows
from parallel.errors import Problem, RunError
from parallel.mesh import Mesh
from parallel.placement import register_gradient_reduction
from training.compute_dtype import DTYPES
from training.config import OptimizerConfig, RunConfig
from training.data.dataset import Batch
from training.data.token_map import TokenMap
from training.engram.memory import EngramMemory, build_memory
from training.model.model import HybridModel, build_model


@dataclass
class Trainer:
    """One rank's share of a run."""

    config: RunConfig
    mesh: Mesh
    device: torch.device
    model: HybridModel
    engine: Engine
    memory: EngramMemory | None

    def rows_for_evaluation(self, batch: Batch) -> dict[int, Rows]:
        """Engram rows of a micro-batch that is not trained on; empty for a model without Engram."""
        if self.memory is None:
            return {}
        return self.memory.look_up(batch.input_ids_BL, batch.seq_idx_BL)

    def rows_for_training(
        self, batch: Batch, following: Callable[[int], list[Batch]]
    ) -> dict[int, Rows]:
        """Engram rows of a micro-batch; empty for a model without Engram.

        Args:
            following: the next n micro-batches; their rows begin to move now, as ``table.prefetch``
                says.
        """
        if self.memory is None:
            return {}
        rows = self.memory.rows_of(batch)
        for later in following(self.config.table.prefetch)[self.memory.num_coming :]:
            self.memory.prefetch(later)
        return rows


def check_compiler(wanted: bool, device: torch.device, *, is_told: bool) -> None:
    """Before torch.compile is used: the line that says how long it takes.

    Raises:
        RunError: it needs a C++ compiler on the CPU, and there is none that works.
    """
    if not wanted:
        return
    if is_told:
        print("compiling pieces of the model by torch.compile: about a minute, once", flush=True)
    if device.type == "cpu" and (problem := compiler_problem()):
        fix = (
            "install g++ and Python's headers, or leave train.compile out: training itself "
            "needs no compiler"
        )
        raise RunError(
            Problem(
                field="train.compile", value=True, rule=f"needs a C++ compiler: {problem}", fix=fix
            )
        )


def build_trainer(
    config: RunConfig, mesh: Mesh, device: torch.device, token_map: TokenMap
) -> Trainer:
    """Allocate tables, build and initialise the model, start the engine."""
    check_compiler(config.train.compile, device, is_told=mesh.global_rank == 0)
    compile_pieces(config.train.compile)
    memory = build_memory(config, mesh, token_map, device)
    model = build_model(
        config.model,
        mesh,
        seed=config.train.seed,
        dtype=DTYPES[config.train.chosen_dtype],
        device=device,
        checkpoint_activations=config.train.checkpoint_activations,
    )
    register_gradient_reduction(model, mesh)
    engine = start_engine(
        model,
        mesh,
        optimizer=adamw(config.optimizer),
        weight_decay=config.optimizer.weight_decay,
        zero_stage=config.parallel.zero_stage,
        micro_batch=config.train.micro_batch,
        accumulation=num_micro_batches(config, mesh),
    )
    return Trainer(
        config,
        mesh,
        device,
        model,
        engine,
        memory,
    )


def adamw(settings: OptimizerConfig) -> MakeOptimizer:
    """The optimizer of all parameters; its names of states are those of every checkpoint so far."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    return make


def num_micro_batches(config: RunConfig, mesh: Mesh) -> int:
    """Micro-batches that each rank accumulates in one optimizer step."""
    return config.train.global_batch // (config.train.micro_batch * mesh.size("batch"))
