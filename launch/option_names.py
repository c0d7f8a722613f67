"""Options as other trainers name them: what they are called here.

Names of Megatron-LM, transformers' Trainer, torchtitan, nanoGPT and DeepSpeed, in lower case,
without their sections.
"""

from collections.abc import Sequence

from parallel.errors import nearest

# Another name: the field that is meant.
FIELDS = {
    "lr": "optimizer.learning_rate",
    "max_lr": "optimizer.learning_rate",
    "peak_lr": "optimizer.learning_rate",
    "base_lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "weight_decay": "optimizer.weight_decay",
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "warmup": "optimizer.warmup_steps",
    "warmup_iters": "optimizer.warmup_steps",
    "lr_warmup_iters": "optimizer.warmup_steps",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "num_warmup_steps": "optimizer.warmup_steps",
    "lr_schedule": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_decay_style": "optimizer.schedule",
    "decay_type": "optimizer.schedule",
    "decay_ratio": "optimizer.decay_fraction",
    "max_grad_norm": "optimizer.clip_norm",
    "max_norm": "optimizer.clip_norm",
    "grad_clip": "optimizer.clip_norm",
    "clip_grad": "optimizer.clip_norm",
    "gradient_clipping": "optimizer.clip_norm",
    "adam_eps": "optimizer.eps",
    "adam_epsilon": "optimizer.eps",
    "batch": "train.global_batch",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "total_batch_size": "train.global_batch",
    "train_batch_size": "train.global_batch",
    "gbs": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "mbs": "train.micro_batch",
    "bs": "train.global_batch",
    "local_batch_size": "train.micro_batch",
    "device_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "total_steps": "train.steps",
    "train_steps": "train.steps",
    "num_train_steps": "train.steps",
    "train_iters": "train.steps",
    "max_iters": "train.steps",
    "num_iterations": "train.steps",
    "iters": "train.steps",
    "precision": "train.dtype",
    "mixed_precision": "train.dtype",
    "torch_dtype": "train.dtype",
    "gradient_checkpointing": "train.checkpoint_activations",
    "activation_checkpointing": "train.checkpoint_activations",
    "activation_checkpoint": "train.checkpoint_activations",
    "recompute_activations": "train.checkpoint_activations",
    "torch_compile": "train.compile",
    "save_interval": "train.save_every",
    "save_steps": "train.save_every",
    "checkpoint_interval": "train.save_every",
    "ckpt_interval": "train.save_every",
    "save_total_limit": "train.keep",
    "keep_latest_k": "train.keep",
    "eval_interval": "train.eval_every",
    "eval_steps": "train.eval_every",
    "log_interval": "train.log_every",
    "log_freq": "train.log_every",
    "logging_steps": "train.log_every",
    "init_from": "train.start_from",
    "finetune_from": "train.start_from",
    "pretrained_checkpoint": "train.start_from",
    "async_mode": "train.async_save",
    "tensor_model_parallel_size": "parallel.tp",
    "tensor_parallel_size": "parallel.tp",
    "tensor_parallel_degree": "parallel.tp",
    "tensor_parallel": "parallel.tp",
    "tp_size": "parallel.tp",
    "expert_model_parallel_size": "parallel.ep",
    "expert_parallel_size": "parallel.ep",
    "expert_parallel_degree": "parallel.ep",
    "expert_parallel": "parallel.ep",
    "ep_size": "parallel.ep",
    "zero": "parallel.zero_stage",
    "stage": "parallel.zero_stage",
    "data": "data.path",
    "data_dir": "data.path",
    "data_path": "data.path",
    "dataset": "data.path",
    "dataset_path": "data.path",
    "dataset_name": "data.path",
    "train_data": "data.path",
    "seq_len": "data.seq_length",
    "sequence_length": "data.seq_length",
    "max_seq_len": "data.seq_length",
    "max_seq_length": "data.seq_length",
    "max_sequence_length": "data.seq_length",
    "context_length": "data.seq_length",
    "block_size": "data.seq_length",
    "max_position_embeddings": "data.seq_length",
    "dim": "model.d_model",
    "width": "model.d_model",
    "n_embd": "model.d_model",
    "hidden_dim": "model.d_model",
    "hidden_size": "model.d_model",
    "model_dim": "model.d_model",
    "num_layers": "model.pattern",
    "num_hidden_layers": "model.pattern",
    "n_layer": "model.pattern",
    "n_layers": "model.pattern",
    "depth": "model.pattern",
    "hybrid_override_pattern": "model.pattern",
    "padded_vocab_size": "model.vocab_size",
    "ffn_dim": "model.mlp_dim",
    "ffn_hidden_size": "model.mlp_dim",
    "intermediate_size": "model.mlp_dim",
    "n_head": "model.attention.num_heads",
    "n_heads": "model.attention.num_heads",
    "num_attention_heads": "model.attention.num_heads",
    "n_kv_heads": "model.attention.num_kv_heads",
    "num_query_groups": "model.attention.num_kv_heads",
    "num_key_value_heads": "model.attention.num_kv_heads",
    "rotary_base": "model.attention.rope_theta",
    "d_state": "model.mamba2.state_dim",
    "mamba_state_dim": "model.mamba2.state_dim",
    "mamba_head_dim": "model.mamba2.head_dim",
    "mamba_num_groups": "model.mamba2.num_groups",
    "d_conv": "model.mamba2.conv_width",
    "n_experts": "model.moe.num_experts",
    "num_local_experts": "model.moe.num_experts",
    "moe_router_topk": "model.moe.top_k",
    "num_experts_per_tok": "model.moe.top_k",
    "moe_ffn_hidden_size": "model.moe.expert_dim",
    "moe_intermediate_size": "model.moe.expert_dim",
    "moe_aux_loss_coeff": "model.moe.aux_loss",
    "router_aux_loss_coef": "model.moe.aux_loss",
    "moe_z_loss_coeff": "model.moe.z_loss",
    "tie_word_embeddings": "model.tie_embeddings",
    "run_name": "name",
    "experiment_name": "name",
    "job_name": "name",
}
# Another name whose meaning is no field of ours, or more than one.
ADVICE = {
    "optimizer": "it is AdamW: --optimizer.learning_rate and others are its fields; "
    "--table.optimizer is Engram rows'",
    "optim": "it is AdamW: --optimizer.learning_rate and others are its fields; --table.optimizer "
    "is Engram rows'",
    "adam_beta1": "use --optimizer.betas 0.9 0.95",
    "adam_beta2": "use --optimizer.betas 0.9 0.95",
    "beta1": "use --optimizer.betas 0.9 0.95",
    "beta2": "use --optimizer.betas 0.9 0.95",
    "min_lr": "use --optimizer.min_ratio, a share of the learning rate",
    "warmup_ratio": "use --optimizer.warmup_steps, a number of steps",
    "warmup_fraction": "use --optimizer.warmup_steps, a number of steps",
    "epoch": "there are no epochs: use --train.steps",
    "epochs": "there are no epochs: use --train.steps",
    "num_epochs": "there are no epochs: use --train.steps",
    "max_epochs": "there are no epochs: use --train.steps",
    "num_train_epochs": "there are no epochs: use --train.steps",
    "train_samples": "use --train.steps, each of --train.global_batch rows",
    "train_tokens": "use --train.steps, each of train.global_batch x data.seq_length tokens",
    "bf16": "use --train.dtype bf16",
    "fp32": "use --train.dtype fp32",
    "fp16": "there is no fp16: use --train.dtype bf16 or fp32",
    "fp8": "there is no fp8 training: use --train.dtype bf16; --table.rows fp8 stores Engram rows "
    "so",
    "gradient_accumulation_steps": "it follows from --train.global_batch, --train.micro_batch and "
    "the data ranks",
    "grad_accum": "it follows from --train.global_batch, --train.micro_batch and the data ranks",
    "seed": "use --train.seed (parameters) or --data.seed (order of rows)",
    "random_seed": "use --train.seed (parameters) or --data.seed (order of rows)",
    "out_dir": "use --name: the run's directory is runs/<name>",
    "output_dir": "use --name: the run's directory is runs/<name>",
    "save_dir": "use --name: the run's directory is runs/<name>",
    "checkpoint_dir": "use --name: the run's directory is runs/<name>",
    "dump_folder": "use --name: the run's directory is runs/<name>",
    "save": "use --name: the run's directory is runs/<name>",
    "load": "use --resume to continue a run, --train.start_from RUN to begin with its weights",
    "resume_from": "use --name and --resume",
    "resume_from_checkpoint": "use --name and --resume",
    "tokenizer": "python -m launch prepare --tokenizer makes the token files with it",
    "tokenizer_path": "python -m launch prepare --tokenizer makes the token files with it",
    "source": "python -m launch prepare --source turns text into token files; then --data.path",
    "preset": "the preset is the first word: python -m launch train tiny",
    "pp": "there is no pipeline parallelism: use --parallel.tp and --parallel.ep",
    "pipeline_model_parallel_size": "there is no pipeline parallelism: use --parallel.tp and "
    "--parallel.ep",
    "pipeline_parallel_degree": "there is no pipeline parallelism: use --parallel.tp and "
    "--parallel.ep",
    "cp": "there is no context parallelism: use --parallel.tp and --parallel.sequence_parallel",
    "context_parallel_size": "there is no context parallelism: use --parallel.tp and "
    "--parallel.sequence_parallel",
    "context_parallel_degree": "there is no context parallelism: use --parallel.tp and "
    "--parallel.sequence_parallel",
    "dp": "data parallel is what tp leaves of the processes: start more of them, as by torchrun "
    "--nproc-per-node",
    "data_parallel_size": "data parallel is what tp leaves of the processes: start more of them",
    "nproc_per_node": "it stands before -m: torchrun --nproc-per-node 8 -m launch train ...",
    "nnodes": "it stands before -m: torchrun --nnodes 2 --nproc-per-node 8 -m launch train ...",
    "num_gpus": "start that many processes: torchrun --nproc-per-node 8 -m launch train ...",
    "gpus": "start that many processes: torchrun --nproc-per-node 8 -m launch train ...",
    "device": "a card is used where there is one; CUDA_VISIBLE_DEVICES= trains on the CPU",
    "deepspeed": "DeepSpeed's configuration is made from the fields: use --parallel.zero_stage",
    "deepspeed_config": "DeepSpeed's configuration is made from the fields: use "
    "--parallel.zero_stage",
    "config": "it takes the preset's place: python -m launch train --config runs/<name>/run.json",
}


def option_name(word: str) -> str:
    """The field's name in an option: ``--train.global-batch=8`` means ``train.global_batch``."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def what_is_meant(name: str, known: Sequence[str]) -> str:
    """What to do about an option that is no field.

    A name of another trainer first; then the one field that ends so; then the field that resembles
    it.

    Args:
        name: as ``option_name`` gives it.
        known: all names that an option may have.
    """
    last = name.lower().rpartition(".")[2]
    if last in FIELDS:
        return f"use --{FIELDS[last]}"
    if last in ADVICE:
        return ADVICE[last]
    ends = [field for field in known if field.rpartition(".")[2] == last]
    if ends:
        one_of = "one of " if len(ends) > 1 else ""
        return f"use {one_of}{', '.join('--' + field for field in ends)}"
    return nearest(
        name,
        known,
        "python -m launch train tiny --help lists them",
        "--",
    )
