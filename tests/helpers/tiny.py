"""A tiny model with every block, on made-up tokens, trained for a few steps on any layout: what
parity tests share.
"""

from dataclasses import replace

import torch

from parallel.mesh import build_mesh
from parallel.mesh_plan import ParallelConfig
from training.config import OptimizerConfig, RunConfig, TrainConfig
from training.data.dataset import Batch
from training.data.token_map import TokenMap
from training.model.config import (
    AttentionConfig,
    EngramConfig,
    Mamba1Config,
    Mamba2Config,
    ModelConfig,
    MoEConfig,
    S4DConfig,
)
from training.step import train_step
from training.trainer import Trainer, build_trainer

VOCAB = 197
LENGTH = 24
GLOBAL_BATCH = 8


def tiny_config(**model_fields) -> RunConfig:
    """Every block: Mamba-2 with one group, Mamba-1, S4D, attention with fewer KV heads than ranks,
    dense and MoE.
    """
    model = ModelConfig(
        pattern="MES*-LE",
        d_model=32,
        vocab_size=VOCAB,
        mlp_dim=48,
        mamba2=Mamba2Config(
            head_dim=8,
            state_dim=12,
            num_groups=1,
            chunk_size=8,
        ),
        mamba1=Mamba1Config(state_dim=4),
        s4d=S4DConfig(state_dim=8),
        attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=8),
        moe=MoEConfig(
            num_experts=4,
            top_k=2,
            expert_dim=24,
            shared_dim=16,
            aux_loss=1e-2,
            z_loss=1e-3,
            bias_rate=1e-2,
        ),
        engram=EngramConfig(
            layers=(1, 3),
            num_heads=2,
            head_dim=8,
            table_size=50,
            init_std=0.5,
        ),
    )
    return RunConfig(
        model=replace(model, **model_fields),
        # Clipping is active in every step, and eps keeps Adam smooth where gradients are near zero.
        optimizer=OptimizerConfig(
            learning_rate=1e-2,
            clip_norm=0.05,
            eps=1e-4,
            warmup_steps=1,
        ),
        train=TrainConfig(global_batch=GLOBAL_BATCH, micro_batch=2, dtype="fp32"),
    )


def made_up_rows(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, targets, documents (GLOBAL_BATCH, LENGTH) of a step: Zipf-like tokens, documents of
    uneven length.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = (torch.rand(GLOBAL_BATCH, LENGTH + 1, generator=generator) ** 3 * VOCAB).long()
    starts = torch.rand(GLOBAL_BATCH, LENGTH, generator=generator) < 0.12
    starts[:, 0] = False
    targets = tokens[:, 1:].clone()
    targets[:, :-1][starts[:, 1:]] = -100
    return tokens[:, :-1].contiguous(), targets, starts.cumsum(1).int()


def made_up_batches(step: int, config: RunConfig, rank: int, num_ranks: int) -> list[Batch]:
    """This data rank's micro-batches of a step, assigned as the loader does."""
    rows = made_up_rows(step)
    size = config.train.micro_batch
    batches = []
    for first in range(rank * size, config.train.global_batch, size * num_ranks):
        ids, targets, documents = (part[first : first + size] for part in rows)
        batches.append(
            Batch(
                ids,
                targets,
                documents,
                int((targets != -100).sum()),
            )
        )
    return batches


def made_up_token_map() -> TokenMap:
    """Some tokens share a compressed id."""
    return TokenMap(ids=torch.arange(VOCAB) % 150, num_compressed=150, pad_id=0)


def make_trainer(config: RunConfig) -> Trainer:
    """A trainer on this rank; ``torch.distributed`` must be initialised."""
    mesh = build_mesh(config.parallel)
    return build_trainer(
        config,
        mesh,
        torch.device("cpu"),
        made_up_token_map(),
    )


def train_steps(config: RunConfig, num_steps: int) -> tuple[Trainer, list[tuple[float, float]]]:
    """Train from scratch; the losses and gradient norms of all steps."""
    trainer = make_trainer(config)
    figures = []
    for step in range(num_steps):
        batches = made_up_batches(
            step,
            config,
            trainer.mesh.rank("batch"),
            trainer.mesh.size("batch"),
        )
        result = train_step(
            trainer,
            batches,
            config.optimizer.learning_rate,
            step,
        )
        figures.append((result.loss, result.grad_norm))
    return trainer, figures


def layout(**fields) -> ParallelConfig:
    """A parallel configuration with ZeRO 1 unless told."""
    return ParallelConfig(**({"zero_stage": 1} | fields))
