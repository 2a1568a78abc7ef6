"""memlm: train and study memory-layer language models."""

__version__ = "0.1.0"
