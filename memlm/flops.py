"""Counted, not measured: parameters, FLOPs and bytes of a model.

What counts as a FLOP: see :mod:`memlm.cost`. A read of a row of ``V`` elements counts ``2 * V``.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import cast

from torch import nn

from memlm.cost import Flops, products
from memlm.memory import MemoryPool
from memlm.transformer import Block, Transformer


@dataclass
class Counts:
    """What a model holds and what one token costs."""

    total: int
    """Parameters, all."""
    active: int
    """Parameters that one token uses: of the pools the rows it reads, of the experts those it is sent to, and
    one row of the embedding."""
    memory: int
    """Parameters in the pools."""
    embedding: int
    """Parameters of the token embedding and the output layer."""
    flops_per_token: int
    """Forward FLOPs a token, at the given sequence length."""
    backward_flops_per_token: int
    """Backward FLOPs a token."""
    values_read_per_token: int
    """Rows of pools that one token reads, over all layers."""
    bytes_read_per_token: int
    """Bytes of those rows, at the values' dtype."""

    def as_dict(self) -> dict[str, int]:
        """Plain dict, for JSON."""
        return asdict(self)


def count(model: Transformer, sequence_length: int) -> Counts:
    """Count a model; works on the meta device.

    Args:
        model: The transformer.
        sequence_length: ``T``, tokens in a sequence. Causal attention is counted as if every position
            attended to all ``T``, as flop_counter does.
    """
    flops, reads, bytes_read, read_elements, active = Flops(), 0, 0, 0, 0
    for block in cast(Iterable[Block], model.blocks):
        for layer in (block.attention, block.feed_forward, block.memory):
            if layer is not None:
                flops += layer.flops(sequence_length)  # type: ignore[operator]
                active += layer.active_parameters()  # type: ignore[operator]
        active += block.attention_norm.weight.numel() + block.feed_forward_norm.weight.numel()
        for pool in (cast(MemoryPool, model.pools[name]) for name in block.pool_names):
            rows = cast(int, cast(nn.Module, block.memory).rows_read)
            flops += read_flops(rows, pool.value_dim)
            reads += rows
            read_elements += rows * pool.value_dim
            bytes_read += rows * pool.value_dim * pool.values.element_size()
    flops += products(model.output.weight)
    embedding = model.embedding.weight.numel()
    dim = model.config.dim
    return Counts(
        total=sum(parameter.numel() for parameter in model.parameters()),
        active=active + read_elements + dim + embedding + (0 if model.config.tie_embeddings else dim),
        memory=sum(cast(MemoryPool, pool).values.numel() for pool in model.pools.values()),
        embedding=embedding * (1 if model.config.tie_embeddings else 2),
        flops_per_token=flops.forward,
        backward_flops_per_token=flops.backward,
        values_read_per_token=reads,
        bytes_read_per_token=bytes_read,
    )


def read_flops(rows: int, value_dim: int) -> Flops:
    """Of a token that reads so many rows; backwards once for the rows and once for their weights."""
    return Flops(2 * rows * value_dim, 4 * rows * value_dim)


PARTS = (
    (r"^embedding\.", "token embedding"),
    (r"^output\.", "output layer"),
    (r"\.attention\.", "attention"),
    (r"\.feed_forward\.", "feed-forward networks"),
    (r"\.experts\.", "experts"),
    (r"\.memory\.query\.", "memory: query"),
    (r"\.memory\.product_keys\.", "memory: half keys"),
    (r"\.memory\.gate\.", "memory: gate"),
    (r"\.memory\.projection\.", "memory: projection"),
    (r"\.memory\.", "memory: other"),
    (r"(^|[._])norm\.", "norms"),
    (r"", "other"),
)
"""A pattern searched in a parameter's name, and the part it belongs to; the first match decides."""


def parts(model: Transformer) -> dict[str, int]:
    """Parameters of each part of a model; they add up to the total.

    Args:
        model: The transformer; may be on the meta device.

    Returns:
        Part -> parameters, empty parts left out. Routers and shared experts belong to the experts; every pool
        is a part of its own, ``values: <name>``.
    """
    sizes = dict.fromkeys((part for _, part in PARTS), 0)
    for name, parameter in model.named_parameters():
        pool = re.fullmatch(r"pools\.(\w+)\.values", name)
        block = re.match(r"blocks\.(\d+)\.feed_forward\.", name)
        if block and int(block[1]) in model.experts:
            name = name.replace("feed_forward", "experts", 1)
        part = next(part for pattern, part in PARTS if re.search(pattern, name))
        part = f"values: {pool[1]}" if pool else part
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    return {part: size for part, size in sizes.items() if size}
