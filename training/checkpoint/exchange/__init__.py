"""Weights in safetensors: for ``transformers`` where it has a class of the same function, and for
ourselves.
"""
