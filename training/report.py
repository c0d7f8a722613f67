"""What a run shows at its end: losses beside n-gram entropies, a sample, the plot, and how to go on."""

from pathlib import Path

import torch.distributed as dist

from training.data.entropy import validation_entropies
from training.data.files import TokenFiles
from training.metrics import Metrics, read_metrics
from training.plot import plot_loss
from training.trainer import Trainer

PROMPT = "def __init__(self"
SAMPLE_TOKENS = 120


def show_end(trainer: Trainer, files: TokenFiles, directory: Path, metrics: Metrics) -> None:
    """On rank 0, from what the run has written; the other ranks wait."""
    if trainer.mesh.global_rank == 0:
        from training.generate import generate

        config = trainer.config
        entropies = validation_entropies(files, config.data.seq_length, config.train.eval_rows)
        losses = [record["val_loss"] for record in read_metrics(directory / "metrics.jsonl") if "val_loss" in record]
        metrics.say(
            f"validation loss {losses[-1]:.4f} nats a token; of the same text, unigram entropy "
            f"{entropies.unigram:.4f}, bigram entropy {entropies.bigram:.4f}"
        )
        metrics.say(f"loss curve: {plot_loss(directory, entropies)}")
        metrics.say(f"sample:\n{generate(directory, PROMPT, SAMPLE_TOKENS, temperature=0.7, top_p=0.9, seed=0)}")
        metrics.say(f"to train further: {resume_command(trainer, 2 * config.train.steps)}")
    dist.barrier()


def resume_command(trainer: Trainer, num_steps: int) -> str:
    """The exact command that continues this run up to ``num_steps``."""
    config, world = trainer.config, trainer.mesh.size("world")
    start = "python" if world == 1 else f"torchrun --standalone --nproc-per-node {world}"
    steps = f" --train.steps {num_steps}" if num_steps != config.train.steps else ""
    return f"{start} -m launch train --config runs/{config.name}/run.json --resume{steps}"
