"""The memory layer: query -> product keys -> read -> gate -> projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.memory.config import MemoryConfig
from memlm.memory.pool import MemoryPool
from memlm.memory.product_keys import ProductKeys
from memlm.memory.query import QueryNetwork


class MemoryLayer(nn.Module):
    """A memory layer in the place of a feed-forward network (Memory Layers at Scale, sections 3.1, 3.2).

    Per head: ``I = top-R slots of <query, key>``, ``s = softmax(scores of I)`` in fp32. The heads'
    reads are one weighted bag: ``y = sum over heads and reads of s * values[I]``. Memory+ then gives
    ``(y * silu(x W1)) W2``; vanilla Memory gives ``y``.

    Args:
        config: Options.
        dim: ``D`` of the model.
    """

    def __init__(self, config: MemoryConfig, dim: int) -> None:
        super().__init__()
        half_key_dim = config.resolved_key_dim(dim) // 2
        value_dim = config.resolved_value_dim(dim)
        self.query = QueryNetwork(dim, config.heads, half_key_dim, config.query_norm)
        self.product_keys = ProductKeys(
            config.heads, config.key_grid, half_key_dim, config.reads, config.kernels
        )
        self.gate = nn.Linear(dim, value_dim) if config.gate == "silu" else None
        self.projection = nn.Linear(value_dim, dim) if config.projection else None

    def address(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots tokens read, and how much of each.

        Args:
            hidden: ``[N, D]``.

        Returns:
            slots: ``[N, H, R]`` int32 (int64 above 2^31 slots).
            weights: ``[N, H, R]`` fp32 (fp64 for fp64 input); they sum to one over the reads of a head.
        """
        query = self.query(hidden)
        slots, scores = self.product_keys(query, self.query.normalise_keys(self.product_keys.keys))
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return slots, scores.softmax(dim=-1, dtype=dtype)

    def forward(self, hidden: Tensor, pool: MemoryPool) -> Tensor:
        """Hidden states ``[B, T, D]`` (already normalised) to the layer's output ``[B, T, D]``."""
        tokens = hidden.flatten(0, -2)
        slots, weights = self.address(tokens)
        output = pool.read(slots.flatten(1), weights.flatten(1))
        if self.gate is not None:
            output = output * F.silu(self.gate(tokens))
        output = output.to(hidden.dtype)
        if self.projection is not None:
            output = self.projection(output)
        return output.view_as(hidden)
