"""Memory layers, in the paper's own order: query, product keys, pool, layer."""

from memlm.memory.config import MemoryConfig
from memlm.memory.engram import EngramConfig, EngramLayer
from memlm.memory.inputs import Inputs
from memlm.memory.layer import MemoryLayer
from memlm.memory.peer import PEERConfig
from memlm.memory.placement import MemoryPlan, Placed, PlacementConfig
from memlm.memory.pool import MemoryPool
from memlm.memory.product_keys import ProductKeys
from memlm.memory.query import QueryNetwork
from memlm.memory.row_gradient import RowGradient
from memlm.memory.tucker import TuckerConfig

__all__ = [
    "EngramConfig",
    "EngramLayer",
    "Inputs",
    "MemoryConfig",
    "MemoryLayer",
    "MemoryPlan",
    "MemoryPool",
    "PEERConfig",
    "Placed",
    "PlacementConfig",
    "ProductKeys",
    "QueryNetwork",
    "RowGradient",
    "TuckerConfig",
]
