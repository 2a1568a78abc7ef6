"""Memory layers, in the paper's own order: query, product keys, pool, layer."""

from memlm.memory.config import MemoryConfig
from memlm.memory.layer import MemoryLayer
from memlm.memory.pool import MemoryPool, RowGradient
from memlm.memory.product_keys import ProductKeys, candidate_pairs
from memlm.memory.query import QueryNetwork

__all__ = [
    "MemoryConfig",
    "MemoryLayer",
    "MemoryPool",
    "ProductKeys",
    "QueryNetwork",
    "RowGradient",
    "candidate_pairs",
]
