"""The query network of a memory layer."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

QueryNorm = Literal["none", "batch", "qk"]


class QueryNetwork(nn.Module):
    """One linear layer with bias, then an optional normalisation.

    - ``none``: the released code's layer.
    - ``batch``: BatchNorm of every query element over the batch's tokens, as in Product Key Memory
      (arXiv 1907.05242, section 4.4), where it raised the share of slots used from 26 % to 80 %.
    - ``qk``: queries and half keys are divided by their root mean square, and the query multiplied by
      a learned gain for each head and half (Memory Layers at Scale, section 3.2, names query-key
      normalisation for small models without giving a formula; RMS with a gain is our choice).

    Args:
        dim: ``D`` of the hidden states.
        heads: ``H``.
        half_key_dim: ``C``.
        norm: Which normalisation.
    """

    def __init__(self, dim: int, heads: int, half_key_dim: int, norm: QueryNorm) -> None:
        super().__init__()
        self.heads, self.half_key_dim = heads, half_key_dim
        self.linear = nn.Linear(dim, heads * 2 * half_key_dim)
        self.batch_norm = nn.BatchNorm1d(heads * 2 * half_key_dim) if norm == "batch" else None
        self.qk_gain = nn.Parameter(self.linear.weight.new_empty(heads, 2, 1)) if norm == "qk" else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Queries ``[N, H, 2, C]`` of hidden states ``[N, D]``."""
        query = self.linear(hidden)
        if self.batch_norm is not None:
            query = self.batch_norm(query)
        query = query.unflatten(-1, (self.heads, 2, self.half_key_dim))
        if self.qk_gain is not None:
            query = F.rms_norm(query, (self.half_key_dim,)) * self.qk_gain
        return query

    def normalise_keys(self, keys: Tensor) -> Tensor:
        """The half keys ``[H, K0 + K1, C]`` as this network's queries are to be compared with them."""
        return keys if self.qk_gain is None else F.rms_norm(keys, (self.half_key_dim,))
