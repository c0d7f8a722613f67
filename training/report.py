"""What a run shows at its end: losses beside n-gram entropies, the plot, a sample, and how to go on."""

import os
import shlex
import sys
from pathlib import Path

from training.config import RunConfig
from training.data.entropy import validation_entropies
from training.data.files import TokenFiles
from training.metrics import read_metrics
from training.plot import plot_loss

PROMPT = "def __init__(self"
SAMPLE_TOKENS = 120


def show_end(config: RunConfig, files: TokenFiles, directory: Path, world_size: int) -> None:
    """Print the end of a run from what it has written. On one process, after the others have left."""
    from training.generate import generate

    entropies = validation_entropies(files, config.data.seq_length, config.train.eval_rows)
    losses = [record["val_loss"] for record in read_metrics(directory / "metrics.jsonl") if "val_loss" in record]
    print(
        f"validation loss {losses[-1]:.4f} nats a token; of the same text by counts of the training "
        f"text, unigram entropy {entropies.unigram:.4f}, "
        f"bigram entropy {entropies.bigram:.4f}"
    )
    print(f"loss curve: {plot_loss(directory, entropies)}")
    print(f"sample:\n{generate(directory, PROMPT, SAMPLE_TOKENS, temperature=0.7, top_p=0.9, seed=0)}")
    print(f"to train further: {resume_command(config, world_size, 2 * config.train.steps)}", flush=True)


def resume_command(config: RunConfig, world_size: int, num_steps: int) -> str:
    """The exact command that continues a run up to ``num_steps`` from where it was started."""
    steps = ["--train.steps", str(num_steps)] if num_steps != config.train.steps else []
    return launch_command(world_size, ["--config", f"runs/{config.name}/run.json", "--resume", *steps])


def launch_command(world_size: int, words: list[str]) -> str:
    """What to type to train on so many processes of this machine; ``words`` follow ``launch train``."""
    python = sys.executable
    inside = os.path.relpath(python)
    start = [python if inside.startswith("..") else inside]
    if world_size > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        start += ["--local-addr", "127.0.0.1"]  # else ranks ask for the host's name, which containers may not know
    return shlex.join([*start, "-m", "launch", "train", *words])
