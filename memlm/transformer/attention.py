"""Grouped-query self-attention with rotary positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.cost import Flops, products
from memlm.transformer.cache import BlockCache
from memlm.transformer.config import RopeScaling, TransformerConfig


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions (RoFormer, arXiv 2104.09864; Llama's half-split layout).

    Args:
        positions: ``[..., T]`` integer, from 0.
        head_dim: Elements of a head, even.
        theta: Base of the frequencies.
        scaling: Which pairs turn slower, None for none. With yarn cosines and sines are multiplied by
            ``0.1 ln(factor) + 1`` (arXiv 2309.00071, section 3.3), and with them queries and keys.

    Returns:
        Two ``[..., T, head_dim]`` fp32 tensors; element ``d`` and ``d + head_dim/2`` form a pair.
    """
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    )
    size = 1.0
    if scaling is not None:
        slowed = _slowed(frequency, theta, scaling)
        frequency = frequency * (1 - slowed) + frequency / scaling.factor * slowed
        if scaling.kind == "yarn":
            size = 0.1 * math.log(scaling.factor) + 1
    angle = positions.unsqueeze(-1) * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * size, angle.sin() * size


def _slowed(frequency: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """How much of its slowing down each pair gets, from 0 (keeps its speed) to 1; like ``frequency``."""
    if scaling.kind == "linear":
        return torch.ones_like(frequency)
    assert scaling.original_length is not None
    slow, fast = scaling.resolved_turns
    if scaling.kind == "llama3":
        turns = scaling.original_length * frequency / (2 * math.pi)
        return ((fast - turns) / (fast - slow)).clamp(0, 1)
    # yarn: a ramp over the pairs' numbers, and not over their turns as in the paper's equation 22; so does
    # the code released with it, for which its checkpoints are made.
    head_dim = 2 * len(frequency)
    first, last = (
        head_dim * math.log(scaling.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (fast, slow)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
    pair = torch.arange(len(frequency), dtype=torch.float32, device=frequency.device)
    return ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)


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
    """Causal self-attention by ``scaled_dot_product_attention``.

    Args:
        config: Options; ``kv_heads`` fewer than ``heads`` is grouped-query attention (arXiv 2305.13245),
            ``attention_bias`` gives queries, keys and values a bias.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.resolved_kv_heads
        self.head_dim = config.resolved_head_dim
        bias = config.attention_bias
        self.query = nn.Linear(config.dim, self.heads * self.head_dim, bias=bias)
        self.key = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        history: BlockCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden: ``[B, T, D]``.
            rotary: From :func:`rotary_table` for ``T`` positions.
            mask: From :func:`document_mask` or :meth:`Cache.begin`; None for plain causal attention.
            history: Keys and values of earlier positions, to which those of these are added.

        Returns:
            ``[B, T, D]``.
        """
        query = rotate(self._heads(self.query(hidden)), rotary)
        key = rotate(self._heads(self.key(hidden)), rotary)
        value = self._heads(self.value(hidden))
        if history is not None:
            key = history.extend("key", key.transpose(1, 2)).transpose(1, 2)
            value = history.extend("value", value.transpose(1, 2)).transpose(1, 2)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            # A single token after others attends to all of them.
            is_causal=mask is None and query.shape[2] == key.shape[2],
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.output(output.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, T, heads * head_dim]`` to ``[B, heads, T, head_dim]``."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def flops(self, sequence_length: int) -> Flops:
        """See :class:`memlm.cost.Layer`; as if each position attended to all, like flop_counter."""
        weights = (self.query.weight, self.key.weight, self.value.weight, self.output.weight)
        # Scores, and the weighted sum of values; each has two products of its size in the backward pass.
        attended = 2 * 2 * sequence_length * self.heads * self.head_dim
        return products(*weights) + Flops(attended, 2 * attended)

    def active_parameters(self) -> int:
        """See :class:`memlm.cost.Layer`: all."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, residual_scale: float) -> None:
        """See :class:`memlm.cost.Layer`: normal, std ``fan_in^-1/2``; biases 0."""
        for linear, scale in (
            (self.query, 1.0), (self.key, 1.0), (self.value, 1.0), (self.output, residual_scale),
        ):  # fmt: skip
            nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
