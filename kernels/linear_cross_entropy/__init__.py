"""Language-model head and cross-entropy in one, without the logits."""

from kernels.linear_cross_entropy.op import linear_cross_entropy, sharded_linear_cross_entropy

__all__ = ["linear_cross_entropy", "sharded_linear_cross_entropy"]
