"""Engram's multi-head n-gram hashing (arXiv 2601.07372, section 2.2)."""

from kernels.engram_hash.layout import NgramHash, ngram_hashes
from kernels.engram_hash.op import engram_hash, engram_hash_layers

__all__ = ["NgramHash", "engram_hash", "engram_hash_layers", "ngram_hashes"]
