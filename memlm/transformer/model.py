"""The decoder: embedding, blocks, output layer."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from memlm.errors import ConfigError
from memlm.memory import Inputs, MemoryPlan, MemoryPool, Placed
from memlm.transformer.attention import Attention, document_mask, rotary_table
from memlm.transformer.cache import BlockCache, Cache
from memlm.transformer.config import TransformerConfig
from memlm.transformer.feed_forward import SwiGLU
from memlm.transformer.initialization import initialise
from memlm.transformer.mixture_of_experts import MixtureOfExperts
from memlm.transformer.moe_config import MoEConfig
from memlm.transformer.recomputation import recomputed


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; memory replaces or joins a part of it.

    Args:
        config: Options of the decoder.
        feed_forward: From ``[B, T, D]`` to ``[B, T, D]``: SwiGLU or experts; None where memory replaces it.
        memory: A layer that reads pools, and their names; None for none.
        mode: ``replace`` or ``beside``: memory reads the normalised input of the feed-forward, and its output
            is added too. ``before``: ``x + memory(x)`` comes first of all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        feed_forward: nn.Module | None,
        memory: Placed | None = None,
        mode: str = "replace",
    ) -> None:
        super().__init__()
        self.mode = mode
        self.recomputed = config.activation_checkpointing
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = feed_forward
        self.memory = memory.layer if memory is not None else None
        self.pool_names: Sequence[str] = memory.pools if memory is not None else ()

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        pools: nn.ModuleDict,
        inputs: Inputs,
    ) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        own = [cast(MemoryPool, pools[name]) for name in self.pool_names]
        if self.recomputed and self.training and torch.is_grad_enabled():
            return recomputed(lambda: self._compute(hidden, rotary, mask, own, inputs), [self, *own])
        return self._compute(hidden, rotary, mask, own, inputs)

    def _compute(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        own: list[MemoryPool],
        inputs: Inputs,
    ) -> Tensor:
        if self.memory is not None and self.mode == "before":
            hidden = hidden + self.memory(hidden, own, inputs)
        history = cast(BlockCache | None, inputs.history)
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, mask, history)
        normed = self.feed_forward_norm(hidden)
        if self.memory is None or self.mode == "before":
            assert self.feed_forward is not None
            return hidden + self.feed_forward(normed)
        if self.feed_forward is None:
            return hidden + self.memory(normed, own, inputs)
        # The layer runs it while it waits for other ranks.
        read, fed = self.memory(normed, own, inputs, beside=self.feed_forward)
        return hidden + fed + read


class Transformer(nn.Module):
    """A decoder whose feed-forward networks may be mixtures of experts, and with memory in some blocks.

    The pools are children of this module and of nothing else: each value table has one owner and one
    state-dict key, ``pools.<name>.values``.

    Args:
        vocab_size: Entries of the tokenizer: rows of the embedding, unless the config has more.
        config: Options of the decoder.
        memory: Options of the memory, None for none.
        moe: Options of the mixtures of experts, None for none.

    Raises:
        ConfigError: A value is out of range; names its key.
    """

    def __init__(
        self,
        vocab_size: int,
        config: TransformerConfig,
        memory: MemoryPlan | None = None,
        moe: MoEConfig | None = None,
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        rows = vocab_size if config.vocab_size is None else config.vocab_size
        if rows < vocab_size:
            raise ConfigError(
                "model.transformer.vocab_size", f"is {rows}, but the tokenizer has {vocab_size} entries"
            )
        inner_dim = config.resolved_feed_forward_dim
        pools: dict[str, MemoryPool] = {}
        placed: dict[int, Placed] = {}
        if memory is not None:
            memory.validate(config.dim, config.layers)
            pools, placed = memory.build(config.dim, config.layers)
        if moe is not None:
            moe.validate(config.dim, config.layers, inner_dim)
            if memory is not None and memory.placed == "replace":
                _check_places(moe, set(placed), config.layers)
        self.pools = nn.ModuleDict(pools)
        self.embedding = nn.Embedding(rows, config.dim)
        self.blocks = nn.ModuleList()
        for index in range(config.layers):
            feed_forward: nn.Module | None = None
            if memory is None or index not in placed or memory.placed != "replace":
                if moe is not None and (moe.layers is None or index in moe.layers):
                    feed_forward = MixtureOfExperts(moe, config.dim, inner_dim)
                else:
                    feed_forward = SwiGLU(config.dim, inner_dim)
            mode = "replace" if memory is None else memory.placed
            self.blocks.append(Block(config, feed_forward, placed.get(index), mode))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, rows, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        # What is split later draws the same initial values as what is not: see memlm.parallel.placing.
        self.drawn_from = torch.get_rng_state() if any(p.values.is_meta for p in pools.values()) else None
        initialise(self)

    @property
    def experts(self) -> dict[int, MixtureOfExperts]:
        """The mixtures of experts, by block."""
        return {
            index: block.feed_forward
            for index, block in enumerate(self.blocks)
            if isinstance(block.feed_forward, MixtureOfExperts)
        }

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
        last: bool = False,
        hidden: bool = False,
    ) -> Tensor:
        """Next-token logits.

        Args:
            tokens: ``[B, T]`` int64.
            documents: ``[B, T]`` document indices that confine attention, or None.
            cache: The tokens before these, to which these are added; rows are padded on the right.
            counts: ``[B]`` int64 on the CPU: how many of each row's ``T`` tokens are no padding, at least
                one. Default: all. Goes with ``cache``.
            last: Whether logits are wanted after each row's last token alone.
            hidden: Whether the hidden states are wanted in place of logits: see :meth:`hidden_states`.

        Returns:
            ``[B, T, vocab rows]``; with ``last`` ``[B, 1, vocab rows]``.
        """
        states = self._hidden_states(tokens, documents, cache, counts)
        if hidden:
            return states
        if last and counts is None:
            states = states[:, -1:]
        elif last and counts is not None:
            rows = torch.arange(len(counts), device=states.device)
            states = states[rows, (counts - 1).to(states.device)].unsqueeze(1)
        return self.output(states)

    def hidden_states(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """What the output layer maps to logits, ``[B, T, D]``; arguments as of :meth:`forward`.

        Until the next call the output layer may be applied to it, or to parts of it.

        Raises:
            ValueError: Both ``documents`` and ``cache`` are given.
        """
        # A call of the module: what splits it over ranks hooks into that.
        return cast(Tensor, self(tokens, documents, cache, counts, hidden=True))

    def _hidden_states(
        self, tokens: Tensor, documents: Tensor | None, cache: Cache | None, counts: Tensor | None
    ) -> Tensor:
        config = self.config
        mask = None if documents is None else document_mask(documents)
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        elif documents is None:
            positions, mask = cache.begin(tokens.shape[1], tokens.device)
        else:
            raise ValueError("documents cannot be told apart in what a cache holds")
        rotary = rotary_table(positions, config.resolved_head_dim, config.rope_theta, config.rope_scaling)
        inputs = Inputs(tokens, documents)
        hidden = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            if cache is not None:
                inputs = inputs._replace(history=cache.blocks[index])
            hidden = block(hidden, rotary, mask, self.pools, inputs)
        if cache is not None:
            cache.advance(counts, tokens.shape[1])
        return self.norm(hidden)


def _check_places(moe: MoEConfig, replaced: set[int], depth: int) -> None:
    """Experts need feed-forward networks that memory has not replaced."""
    taken = replaced.intersection(moe.placement(depth))
    if taken and (moe.layers is not None or taken == set(range(depth))):
        raise ConfigError(
            "model.moe.layers",
            f"places experts in blocks {moe.placement(depth)}, but memory replaces the feed-forward networks "
            f"of blocks {sorted(taken)}; model.memory.mode: beside would keep them",
        )
