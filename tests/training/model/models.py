"""The tiny model with every block, its tables, and its loss on made-up rows.

B batch, L length.
"""

import torch

from parallel.mesh import single_mesh
from tests.helpers.tiny import made_up_rows, made_up_token_map, tiny_config
from training.config import RunConfig
from training.engram.memory import EngramMemory, build_memory, memory_of
from training.model.config import AttentionConfig
from training.model.model import HybridModel, build_model

CPU = torch.device("cpu")


def run_config(**fields) -> RunConfig:
    """Every block, four streams and rotary attention unless told."""
    attention = AttentionConfig(
        num_heads=4,
        num_kv_heads=1,
        head_dim=8,
        positions="rope",
    )
    return tiny_config(**({"num_streams": 4, "attention": attention} | fields))


def build(
    config: RunConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    random: bool = True,
    **kwargs,
) -> HybridModel:
    """With ``random``, no parameter keeps a constant that would hide a term."""
    model = build_model(
        config.model,
        single_mesh(),
        seed=seed,
        dtype=dtype,
        device=CPU,
        **kwargs,
    )
    if random:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def build_tables(config: RunConfig) -> EngramMemory | None:
    """The Engram memory of a configuration; None where it has none."""
    return build_memory(
        config,
        single_mesh(),
        made_up_token_map(),
        CPU,
    )


def fetch(
    tables: EngramMemory | None, ids_BL: torch.Tensor, seq_idx_BL: torch.Tensor | None
) -> dict:
    """Memory rows of a batch as the model reads them; none without tables."""
    return {} if tables is None else memory_of(tables.look_up(ids_BL, seq_idx_BL))


def loss_of(
    model: HybridModel, tables: EngramMemory | None, step: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and auxiliary loss on a few made-up rows."""
    ids_BL, targets_BL, seq_idx_BL = (part[:4] for part in made_up_rows(step))
    return model(
        ids_BL,
        targets_BL,
        seq_idx_BL,
        fetch(tables, ids_BL, seq_idx_BL),
    )


def initial(seed: int = 0, random: bool = False, **fields) -> dict[str, torch.Tensor]:
    """Parameters of a fresh model, by name."""
    return {
        name: p.detach()
        for name, p in build(run_config(**fields), seed=seed, random=random).named_parameters()
    }
