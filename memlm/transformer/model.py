"""The decoder: embedding, blocks, output layer."""

from collections import Counter

import torch
from torch import Tensor, nn

from memlm.errors import ConfigError
from memlm.memory import MemoryConfig, MemoryLayer, MemoryPool
from memlm.transformer.attention import Attention, document_mask, rotary_table
from memlm.transformer.config import TransformerConfig
from memlm.transformer.feed_forward import SwiGLU
from memlm.transformer.initialization import initialise


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Args:
        config: Options of the decoder.
        feed_forward: Any module from ``[B, T, D]`` to ``[B, T, D]``; with ``pool_name`` it is called with
            that pool as a second argument.
        pool_name: Name of the pool that the feed-forward reads, None if it reads none.
    """

    def __init__(self, config: TransformerConfig, feed_forward: nn.Module, pool_name: str | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = feed_forward
        self.pool_name = pool_name

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, pools: nn.ModuleDict
    ) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, mask)
        normed = self.feed_forward_norm(hidden)
        if self.pool_name is None:
            return hidden + self.feed_forward(normed)
        return hidden + self.feed_forward(normed, pools[self.pool_name])


class Transformer(nn.Module):
    """A decoder whose feed-forward networks may be replaced by memory layers.

    The pools are children of this module and of nothing else: each value table has one owner and one
    state-dict key, ``pools.<name>.values``.

    Args:
        vocab_size: Rows of the embedding.
        config: Options of the decoder.
        memory: Options of the memory layers, None for a dense model.

    Raises:
        ConfigError: A value is out of range; names its key.
    """

    def __init__(
        self, vocab_size: int, config: TransformerConfig, memory: MemoryConfig | None = None
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        pool_names: dict[int, str] = {}
        self.pools = nn.ModuleDict()
        if memory is not None:
            memory.validate(config.dim, config.layers)
            pool_names = memory.pool_names(config.layers)
            readers = Counter(pool_names.values())
            for name, layers in readers.items():
                self.pools[name] = _pool(memory, config.dim, alone=layers == 1)
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        for index in range(config.layers):
            feed_forward: nn.Module
            if memory is not None and index in pool_names:
                feed_forward = MemoryLayer(memory, config.dim)
            else:
                feed_forward = SwiGLU(config.dim, config.resolved_feed_forward_dim)
            self.blocks.append(Block(config, feed_forward, pool_names.get(index)))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        initialise(self)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Next-token logits.

        Args:
            tokens: ``[B, T]`` int64.
            documents: ``[B, T]`` document indices that confine attention, or None.

        Returns:
            ``[B, T, vocab_size]``.
        """
        rotary = rotary_table(
            tokens.shape[1], self.config.head_dim, self.config.rope_theta, device=tokens.device
        )
        mask = None if documents is None else document_mask(documents)
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, rotary, mask, self.pools)
        return self.output(self.norm(hidden))


def _pool(memory: MemoryConfig, dim: int, alone: bool) -> MemoryPool:
    slots, value_dim = memory.slots, memory.resolved_value_dim(dim)
    dtype = getattr(torch, memory.values_dtype)
    try:
        return MemoryPool(slots, value_dim, dtype, memory.kernels, alone)
    except RuntimeError as error:
        size = slots * value_dim * dtype.itemsize / 2**30
        raise ConfigError(
            "model.memory.half_keys",
            f"makes {slots:,} values of {value_dim} elements, {size:,.0f} GiB, which could not be allocated",
        ) from error
