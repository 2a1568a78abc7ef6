"""The decoder and its parts: plain modules for a single device."""

from memlm.transformer.config import TransformerConfig
from memlm.transformer.model import Block, Transformer

__all__ = ["Block", "Transformer", "TransformerConfig"]
