"""Checkpoints: sharded, logical, complete or absent."""

from training.checkpoint.save_and_load import latest, load, load_initial, load_weights, prune, save
from training.checkpoint.saver import Saver

__all__ = ["Saver", "latest", "load", "load_initial", "load_weights", "prune", "save"]
