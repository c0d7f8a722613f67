"""Checkpoints: sharded, logical, complete or absent."""

from training.checkpoint.run import latest, load, load_weights, prune, save

__all__ = ["latest", "load", "load_weights", "prune", "save"]
