"""Names of other trainers' options are answered with ours."""

import pytest

from launch.option_names import ADVICE, FIELDS, what_is_meant
from launch.option_values import field_types, read_words
from training.config import RunConfig

TYPES = field_types(RunConfig)
# Option: what its answer must name.
MEANT = {
    "--lr": "--optimizer.learning_rate",
    "--learning-rate": "--optimizer.learning_rate",
    "--train.lr": "--optimizer.learning_rate",
    "--optimizer.lr=3e-4": "--optimizer.learning_rate",
    "--warmup_steps": "--optimizer.warmup_steps",
    "--train.warmup_steps": "--optimizer.warmup_steps",
    "--wd": "--optimizer.weight_decay",
    "--weight-decay": "--optimizer.weight_decay",
    "--batch-size": "--train.global_batch",
    "--bs": "--train.global_batch",
    "--global-batch-size": "--train.global_batch",
    "--micro-batch-size": "--train.micro_batch",
    "--training.local_batch_size": "--train.micro_batch",
    "--per_device_train_batch_size": "--train.micro_batch",
    "--seq-len": "--data.seq_length",
    "--training.seq_len": "--data.seq_length",
    "--model.max_seq_len": "--data.seq_length",
    "--max-steps": "--train.steps",
    "--train-iters": "--train.steps",
    "--steps": "--train.steps",
    "--epochs": "--train.steps",
    "--num_train_epochs": "--train.steps",
    "--bf16": "--train.dtype bf16",
    "--fp32": "--train.dtype fp32",
    "--fp16": "there is no fp16",
    "--tp": "--parallel.tp",
    "--train.tp": "--parallel.tp",
    "--tensor-model-parallel-size": "--parallel.tp",
    "--ep": "--parallel.ep",
    "--expert-model-parallel-size": "--parallel.ep",
    "--zero-stage": "--parallel.zero_stage",
    "--zero_optimization.stage": "--parallel.zero_stage",
    "--save-interval": "--train.save_every",
    "--eval-interval": "--train.eval_every",
    "--logging_steps": "--train.log_every",
    "--seed": "--train.seed",
    "--output-dir": "runs/<name>",
    "--dataset": "--data.path",
    "--data-path": "--data.path",
    "--num-layers": "--model.pattern",
    "--hidden-size": "--model.d_model",
    "--num-attention-heads": "--model.attention.num_heads",
    "--LR": "--optimizer.learning_rate",
    "--head_dim": "use one of --model.mamba2.head_dim, --model.attention.head_dim, "
    "--model.engram.head_dim",
}


@pytest.mark.parametrize("option", MEANT)
def test_names_of_other_trainers_are_answered_with_ours(option):
    kept, (problem,) = read_words([option, "3", "--train.steps", "4"], TYPES)
    assert MEANT[option] in problem.fix
    assert kept == ["--train.steps", "4"]


def test_answers_name_fields():
    assert set(FIELDS.values()) <= set(TYPES)
    named = " ".join(ADVICE.values()).replace(",", "").replace(":", "").replace(";", "").split()
    for word in (
        word
        for word in named
        if word.startswith(("--optimizer.", "--train.", "--parallel.", "--data."))
    ):
        assert word.removeprefix("--") in TYPES
    assert "lists them" in what_is_meant("zzz", list(TYPES))
