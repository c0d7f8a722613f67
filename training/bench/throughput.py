"""Training speed beside transformers' GraniteMoeHybridForCausalLM of the same shape:
``make bench``.

Or ``torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 1 -m training.bench.throughput``,
with OMP_NUM_THREADS set to the cores.

Shape: hidden 256; three Mamba-2 layers (8 heads x 64, state 64, one group) and one of attention (4
heads x 64, 2 of keys), each followed by 8 experts top-2 (256) beside a shared MLP (256); vocabulary
8,192; batch 4 x 512; AdamW at 1e-3. All candidates train in one process, in turn, on the same
batches: a busy machine slows all of them.

The peer comes twice: with its own defaults (chunks of 256 tokens, torch's AdamW as it is), and
tuned as ours is (chunks of 64, fused AdamW). What is the same: parameters (within 1 %), tokens,
targets, clipping at norm 1, no positions, no auxiliary loss. What differs, each to our
disadvantage: ours runs in the DeepSpeed engine with fp32 master weights, balances its experts by a
bias, and respects document boundaries; the peer in bf16 has no master weights and no boundaries.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from kernels.timing import machine, print_table, spread
from parallel.device import choose_dtype, local_device
from parallel.mesh import Mesh, build_mesh, start_world
from parallel.mesh_plan import ParallelConfig
from training.compute_dtype import DTYPES, name_of
from training.config import DataConfig, Dtype, OptimizerConfig, RunConfig, TrainConfig
from training.data.dataset import Batch, PackedRows
from training.data.files import TokenFiles
from training.data.loader import load_step
from training.data.token_map import TokenMap
from training.model.config import AttentionConfig, Mamba2Config, ModelConfig, MoEConfig
from training.step import train_step
from training.trainer import build_trainer

BATCH = 4
LENGTH = 512
VOCAB = 8192
LEARNING_RATE = 1e-3
CLIP = 1.0
CORPUS = Path("data/stdlib")
WARM_UP_ROUNDS = 4


class Side(Protocol):
    """A model in training, ours or the peer."""

    num_parameters: int

    def step(self, batch: Batch) -> float:
        """One optimizer step; the mean loss before it."""


class Ours:
    """Our model in our own step."""

    def __init__(self, dtype: Dtype, mesh: Mesh, compile: bool) -> None:
        config = RunConfig(
            model=ModelConfig(
                pattern="ME" * 3 + "*E",
                d_model=256,
                vocab_size=VOCAB,
                mamba2=Mamba2Config(state_dim=64, chunk_size=64),
                attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64),
                moe=MoEConfig(
                    num_experts=8,
                    top_k=2,
                    expert_dim=256,
                    shared_dim=256,
                ),
            ),
            data=DataConfig(seq_length=LENGTH),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, clip_norm=CLIP),
            train=TrainConfig(
                global_batch=BATCH,
                micro_batch=BATCH,
                dtype=dtype,
                compile=compile,
            ),
        )
        every_token = TokenMap(ids=torch.arange(VOCAB), num_compressed=VOCAB, pad_id=0)
        self.trainer = build_trainer(config, mesh, local_device(), every_token)
        self.num_parameters = sum(
            parameter.numel() for parameter in self.trainer.model.parameters()
        )

    def step(self, batch: Batch) -> float:
        return train_step(self.trainer, [batch], LEARNING_RATE, 0).loss


class Peer:
    """transformers' model in the plain loop."""

    def __init__(self, dtype: Dtype, tuned: bool) -> None:
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
            mamba_chunk_size=64 if tuned else 256,
        )
        self.model = GraniteMoeHybridForCausalLM(config).train()
        self.model.to(device=local_device(), dtype=DTYPES[dtype])  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, fused=tuned or None
        )
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, batch: Batch) -> float:
        device = self.model.device
        targets = batch.targets_BL.to(device)
        loss = self.model(
            input_ids=batch.input_ids_BL.to(device),
            labels=targets,
            shift_labels=targets,
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


@dataclass
class Record:
    """What one candidate did in its turns."""

    side: Side
    tokens_per_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def measure(
    mesh: Mesh, dtypes: Sequence[Dtype], rounds: int, steps: int, compile: bool
) -> dict[str, Record]:
    """Train all candidates in turn, ``steps`` steps a round on the same rows; the first rounds warm
    up.

    What each did in a round is printed when it has done it.
    After some twelve steps every temporary finds memory that was used before, and no step waits for
    pages any more.
    """
    rows = PackedRows(
        TokenFiles.open(CORPUS),
        "train",
        LENGTH,
        seed=0,
    )
    records = {f"ours, {dtype}": Record(Ours(dtype, mesh, compile)) for dtype in dtypes}
    records |= {f"peer as it comes, {dtype}": Record(Peer(dtype, tuned=False)) for dtype in dtypes}
    records |= {f"peer tuned, {dtype}": Record(Peer(dtype, tuned=True)) for dtype in dtypes}
    for turn in range(WARM_UP_ROUNDS + rounds):
        print(
            "warm-up"
            if turn < WARM_UP_ROUNDS
            else f"round {turn - WARM_UP_ROUNDS + 1} of {rounds}",
            flush=True,
        )
        batches = [
            load_step(
                rows,
                (turn * steps + step) * BATCH,
                BATCH,
                BATCH,
            )[0]
            for step in range(steps)
        ]
        for name, record in records.items():
            begin = time.perf_counter()
            record.losses += [record.side.step(batch) for batch in batches]
            tokens_per_s = steps * BATCH * LENGTH / (time.perf_counter() - begin)
            print(f"  {name}: {tokens_per_s:.0f} tokens/s", flush=True)
            if turn >= WARM_UP_ROUNDS:
                record.tokens_per_s.append(tokens_per_s)
    return records


def show(records: dict[str, Record]) -> None:
    """The table, and the ratio to the best of the peer's forms; no ratio where a model has not
    learned.
    """
    print_table(
        [["", "parameters", "tokens/s: median (range)", "loss, first and last"]]
        + [
            [
                name,
                f"{r.side.num_parameters:,}",
                spread(r.tokens_per_s),
                f"{r.losses[0]:.2f} {r.losses[-1]:.2f}",
            ]
            for name, r in records.items()
        ]
    )
    if not all(record.losses[-1] < record.losses[0] - 0.5 for record in records.values()):
        print("no ratio: a loss has not fallen")
        return
    medians = {name: statistics.median(record.tokens_per_s) for name, record in records.items()}
    best = {
        kind: max(v for k, v in medians.items() if k.startswith(kind))
        for kind in ("ours", "peer as", "peer tuned")
    }
    print(
        f"best dtype of each: {best['ours'] / best['peer as']:.2f}x the peer as it comes, "
        f"{best['ours'] / best['peer tuned']:.2f}x the peer tuned"
    )


def main() -> None:
    """Parse the options, measure in turns, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m training.bench.throughput",
        description="Training speed beside transformers.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=6,
        help="rounds that count",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="steps of each candidate a round",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the kernels' elementwise pieces"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 also where this device is slow in it"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    start_world("gloo")
    print(f"{machine()}{', compiled pieces' if arguments.compile else ''}", flush=True)
    choice = choose_dtype(local_device())
    dtypes = list(DTYPES)
    if name_of(choice) == "fp32" and not arguments.bf16:
        print(f"bf16 is left out: {choice.reason}; --bf16 takes it in", flush=True)
        dtypes = ["fp32"]
    records = measure(
        build_mesh(ParallelConfig()), dtypes, arguments.rounds, arguments.steps, arguments.compile
    )
    show(records)


if __name__ == "__main__":
    main()
