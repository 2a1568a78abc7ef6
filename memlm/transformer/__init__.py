"""The decoder and its parts: plain modules for a single device."""

from memlm.transformer.cache import Cache
from memlm.transformer.config import TransformerConfig
from memlm.transformer.model import Block, Transformer
from memlm.transformer.moe_config import MoEConfig

__all__ = ["Block", "Cache", "MoEConfig", "Transformer", "TransformerConfig"]
