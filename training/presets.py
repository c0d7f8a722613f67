"""Presets: functions that return a RunConfig. Parameter counts in the docstrings are checked by
tests (model/count.py).

"Active" is what a token is multiplied with: all but the input embedding, the table rows and the
experts not chosen. It is the count that reproduces the 3.8B of the Engram paper's models (arXiv
2601.07372, table 1).
"""

from collections.abc import Callable
from dataclasses import replace

from parallel.table_config import TableConfig
from training.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from training.model.config import (
    AttentionConfig,
    EngramConfig,
    Mamba2Config,
    ModelConfig,
    MoEConfig,
)

# DeepSeek-V3's tokenizer, the one of the Engram paper.
PAPER_VOCAB = 129_280


def tiny() -> RunConfig:
    """Every block at a toy size: minutes on two cores. 3.5M parameters, 1.9M active, and 9.9M in
    tables.

    A step is 50 GFLOP: 200 of them fit into three minutes of two cores without bf16, which do some
    70 GFLOP/s. For two processes add ``--parallel.ep 2``.
    """
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            pattern="MEM*ME",
            d_model=128,
            vocab_size=8192,
            mamba2=Mamba2Config(state_dim=64, chunk_size=64),
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
            moe=MoEConfig(
                num_experts=8,
                top_k=2,
                expert_dim=128,
                shared_dim=128,
                bias_rate=1e-2,
            ),
            engram=EngramConfig(
                layers=(1, 3),
                num_heads=4,
                head_dim=32,
                table_size=19_200,
            ),
        ),
        data=DataConfig(path="data/stdlib", seq_length=256),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
        train=TrainConfig(
            steps=200,
            global_batch=16,
            micro_batch=8,
            eval_every=50,
            save_every=100,
        ),
    )


def tiny_v41() -> RunConfig:
    """``tiny`` with the Engram of DeepSeek-V4.1. 3.6M parameters, 1.9M active, and 14.8M in tables.

    From its report (arXiv 2609.19969, sections 2.4.2 and 2.5): orders 2 to 4, no short convolution,
    rows in fp8 with a scale for 32 values, momentum + Sinkhorn at 5 times the rate without decay.
    Ours: all sizes, one residual stream.
    """
    base = tiny()
    assert base.model.engram is not None
    engram = replace(base.model.engram, orders=(2, 3, 4), conv=False)
    table = TableConfig(rows="fp8", optimizer="momentum_sinkhorn")
    return replace(
        base,
        name="tiny-v41",
        model=replace(base.model, engram=engram),
        table=table,
    )


def small() -> RunConfig:
    """For one card; ten days at the 66 GFLOP/s of two cores. 86M parameters, 27M active, and 82M in
    tables.
    """
    return RunConfig(
        name="small",
        model=ModelConfig(
            pattern="MEMEM*EMEME",
            d_model=512,
            vocab_size=8192,
            mamba2=Mamba2Config(num_groups=2),
            attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=64),
            moe=MoEConfig(
                num_experts=16,
                top_k=2,
                expert_dim=512,
                shared_dim=512,
                aux_loss=1e-4,
            ),
            engram=EngramConfig(
                layers=(2, 5),
                num_heads=8,
                head_dim=32,
                table_size=80_000,
            ),
        ),
        data=DataConfig(path="data/stdlib", seq_length=1024),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        train=TrainConfig(
            steps=5000, global_batch=64, micro_batch=8, eval_every=250, save_every=500
        ),
    )


def moe_3b() -> RunConfig:
    """The Engram paper's ablation baseline, as a hybrid. 3.0B parameters, 0.56B active.

    From the paper (arXiv 2601.07372, sections 3.2 and 6.2, appendix A): 12 blocks of mixer and
    experts, 3B parameters of which 0.56B are active, 100B tokens, vocabulary 129,280, 6 routed
    experts a token of 72 beside 2 shared ones, loss-free balancing, 4 residual streams, base rate
    4e-4, weight decay 0.1. Ours: the mixers (10 Mamba-2 and 2 NoPE attention where the paper has 12
    of MLA), the widths, which the paper does not print, AdamW and a cosine where it has Muon and
    step decay, and the batch of 2.1M tokens.
    """
    return RunConfig(
        name="moe-3b",
        model=ModelConfig(
            pattern="MEMEMEME*EMEMEMEME*EMEME",
            d_model=1280,
            vocab_size=PAPER_VOCAB,
            num_streams=4,
            mamba2=Mamba2Config(num_groups=4, chunk_size=128),
            attention=AttentionConfig(num_heads=10, num_kv_heads=2, head_dim=128),
            moe=MoEConfig(
                num_experts=72, top_k=6, expert_dim=736, shared_dim=2 * 736, aux_loss=1e-4
            ),
        ),
        data=DataConfig(path="data/pretrain", seq_length=4096),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
        train=_long_training(steps=47_700, global_batch=512),
    )


def moe_3b_engram_1p6b() -> RunConfig:
    """moe-3b with 1.6B of Engram memory, as the paper ablates. 3.0B parameters, 0.58B active, and
    1.6B in tables.

    From the paper (section 6.2): 1.6B parameters in tables before the mixers of the second and
    sixth block, orders 2 and 3, 8 heads, tables learn at 5 times the rate without decay. Ours: rows
    of 80 (memory as wide as the model, as in Engram-27B at half its width), hence 625,000 rows a
    head.
    """
    base = moe_3b()
    engram = EngramConfig(
        layers=(2, 10),
        num_heads=8,
        head_dim=80,
        table_size=625_000,
    )
    return replace(base, name="moe-3b-engram-1.6b", model=replace(base.model, engram=engram))


def hybrid_27b() -> RunConfig:
    """The class of Engram-27B, as a hybrid. 21B parameters, 3.86B active, and 5.8B in tables: 26B
    in all.

    From the paper (table 5): width 2560, vocabulary 129,280, 4 residual streams, 6 routed experts a
    token beside 2 shared ones, Engram of orders 2 and 3, 8 heads, memory width 1280, 2,262,400 rows
    a head before an early and a middle block, 26.7B parameters in all of which 3.8B are active,
    base rate 4e-4, batch 1280 x 4096, 50,000 steps. Ours: a pattern in the manner of Nemotron 3
    Nano (24 Mamba-2, 24 expert and 6 attention layers) where the paper has 30 blocks of MLA and
    experts, 64 experts of width 1536 (the paper: 55), AdamW and a cosine.
    """
    return RunConfig(
        name="hybrid-27b",
        model=ModelConfig(
            pattern="MEMEM*E" * 5 + "MEMEMEM*E" + "ME" * 5,
            d_model=2560,
            vocab_size=PAPER_VOCAB,
            num_streams=4,
            mamba2=Mamba2Config(num_groups=8, chunk_size=128),
            attention=AttentionConfig(num_heads=32, num_kv_heads=2, head_dim=128),
            moe=MoEConfig(
                num_experts=64, top_k=6, expert_dim=1536, shared_dim=2 * 1536, aux_loss=1e-4
            ),
            engram=EngramConfig(
                layers=(2, 25),
                num_heads=8,
                head_dim=80,
                table_size=2_262_400,
            ),
        ),
        data=DataConfig(path="data/pretrain", seq_length=4096),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
        train=_long_training(steps=50_000, global_batch=1280),
    )


def _long_training(steps: int, global_batch: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        global_batch=global_batch,
        micro_batch=1,
        checkpoint_activations=True,
        eval_every=1000,
        eval_rows=1024,
        save_every=1000,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "tiny-v41": tiny_v41,
    "small": small,
    "moe-3b": moe_3b,
    "moe-3b-engram-1.6b": moe_3b_engram_1p6b,
    "hybrid-27b": hybrid_27b,
}
