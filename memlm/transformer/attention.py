"""Grouped-query self-attention with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.transformer.config import TransformerConfig


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions (RoFormer, arXiv 2104.09864; Llama's half-split layout).

    Returns:
        Two ``[length, head_dim]`` fp32 tensors; element ``d`` and ``d + head_dim/2`` form a pair.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of elements of ``x`` ``[..., T, head_dim]`` by its position's angle."""
    cos, sin = (part.to(x.dtype) for part in table)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def document_mask(documents: Tensor) -> Tensor:
    """Which positions attend to which: earlier ones, or the same, of the same document.

    Args:
        documents: ``[B, T]`` integer document indices.

    Returns:
        ``[B, 1, T, T]`` bool, True where position ``t`` (dim 2) may attend to position ``s`` (dim 3).
    """
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


class Attention(nn.Module):
    """Causal self-attention by ``scaled_dot_product_attention``; no biases.

    Args:
        config: Options; ``kv_heads`` fewer than ``heads`` is grouped-query attention (arXiv 2305.13245).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.resolved_kv_heads
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.dim, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            hidden: ``[B, T, D]``.
            rotary: From :func:`rotary_table` for ``T`` positions.
            mask: From :func:`document_mask`, or None for plain causal attention.

        Returns:
            ``[B, T, D]``.
        """
        query = rotate(self._heads(self.query(hidden)), rotary)
        key = rotate(self._heads(self.key(hidden)), rotary)
        value = self._heads(self.value(hidden))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return self.output(output.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, T, heads * head_dim]`` to ``[B, heads, T, head_dim]``."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
