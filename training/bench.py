"""Training speed beside transformers' GraniteMoeHybridForCausalLM of the same shape: ``python -m training.bench``.

Shape: hidden 256; three Mamba-2 layers (8 heads x 64, state 64, one group) and one of attention (4 heads x 64, 2 of
keys), each followed by 8 experts top-2 (256) beside a shared MLP (256); vocabulary 8,192; batch 4 x 512; AdamW at 1e-3.
All candidates train in one process, in turn, on the same batches: a busy machine slows all of them.

What is the same: parameters (within 1 %), tokens, targets, clipping at norm 1, fused AdamW, no positions, no auxiliary
loss. What differs, each to our disadvantage: ours runs in the DeepSpeed engine with fp32 master weights and balances its
experts by a bias, and respects document boundaries in convolution, scan and attention. The peer in bf16 has no master
weights, and no boundaries anywhere. The peer's experts run by its default, grouped products.
"""

from pathlib import Path
from typing import Protocol

import torch

from parallel.device import local_device
from parallel.mesh import Mesh
from training.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from training.data.dataset import Batch
from training.data.token_map import TokenMap
from training.model.config import AttentionConfig, Mamba2Config, ModelConfig, MoEConfig
from training.step import train_step
from training.trainer import DTYPES, build_trainer

BATCH, LENGTH, VOCAB, LEARNING_RATE, CLIP = 4, 512, 8192, 1e-3, 1.0
CORPUS = Path("data/stdlib")


class Side(Protocol):
    """A model in training."""

    num_parameters: int

    def step(self, batch: Batch) -> float:
        """One optimizer step; the mean loss before it."""


class Ours:
    """Our model in our own step."""

    def __init__(self, dtype: str, mesh: Mesh, compile: bool) -> None:
        config = RunConfig(
            model=ModelConfig(
                pattern="ME" * 3 + "*E",
                d_model=256,
                vocab_size=VOCAB,
                mamba2=Mamba2Config(state_dim=64, chunk_size=64),
                attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64),
                moe=MoEConfig(num_experts=8, top_k=2, expert_dim=256, shared_dim=256),
            ),
            data=DataConfig(seq_length=LENGTH),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, clip_norm=CLIP),
            train=TrainConfig(global_batch=BATCH, micro_batch=BATCH, dtype=dtype, compile=compile),
        )
        every_token = TokenMap(ids=torch.arange(VOCAB), num_compressed=VOCAB, pad_id=0)
        self.trainer = build_trainer(config, mesh, local_device(), every_token)
        self.num_parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters())

    def step(self, batch: Batch) -> float:
        return train_step(self.trainer, [batch], LEARNING_RATE, 0).loss


class Peer:
    """transformers' model in the plain loop."""

    def __init__(self, dtype: str) -> None:
        from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

        torch.manual_seed(0)
        config = GraniteMoeHybridConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=256,
            shared_intermediate_size=256,
            num_hidden_layers=4,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_multiplier=64**-0.5,
            num_local_experts=8,
            num_experts_per_tok=2,
            mamba_n_heads=8,
            mamba_d_head=64,
            mamba_d_state=64,
            mamba_n_groups=1,
            mamba_chunk_size=64,
        )
        self.model = GraniteMoeHybridForCausalLM(config).to(local_device(), DTYPES[dtype]).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, batch: Batch) -> float:
        device = self.model.device
        targets = batch.targets_BL.to(device)
        loss = self.model(
            input_ids=batch.input_ids_BL.to(device), labels=targets, shift_labels=targets, use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)
