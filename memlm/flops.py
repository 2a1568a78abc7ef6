"""Counted, not measured: parameters, FLOPs and bytes of a model.

A multiply-add is two FLOPs. Matrix products and attention count, elementwise work does not (nor does
``torch.utils.flop_counter`` count it); a weighted read counts ``2 * V`` FLOPs a row, and its bytes.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import cast

from memlm.memory import MemoryLayer, MemoryPool
from memlm.transformer import Block, Transformer
from memlm.transformer.feed_forward import SwiGLU


@dataclass
class Counts:
    """What a model holds and what one token costs."""

    total: int
    """Parameters, all."""
    active: int
    """Parameters that one token uses: of the pools only the rows it reads, of the embedding one row."""
    memory: int
    """Parameters in the pools."""
    flops_per_token: int
    """Forward FLOPs a token, at the given sequence length."""
    values_read_per_token: int
    """Value rows that one token reads, over all layers."""
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
    memory = sum(cast(MemoryPool, pool).values.numel() for pool in model.pools.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    vocab_size, dim = model.embedding.weight.shape
    flops = values_read = bytes_read = read_elements = 0
    for block in cast(Iterable[Block], model.blocks):
        attention, feed_forward = block.attention, block.feed_forward
        projections = (attention.query, attention.key, attention.value, attention.output)
        flops += sum(2 * linear.weight.numel() for linear in projections)
        flops += 2 * 2 * sequence_length * attention.heads * attention.head_dim
        if isinstance(feed_forward, MemoryLayer):
            assert block.pool_name is not None
            pool = cast(MemoryPool, model.pools[block.pool_name])
            reads = feed_forward.product_keys.heads * feed_forward.product_keys.reads
            values_read += reads
            read_elements += reads * pool.value_dim
            bytes_read += reads * pool.value_dim * pool.values.element_size()
            flops += memory_layer_flops(feed_forward) + 2 * reads * pool.value_dim
        elif isinstance(feed_forward, SwiGLU):
            flops += sum(2 * parameter.numel() for parameter in feed_forward.parameters())
        else:
            raise TypeError(f"no count for a feed-forward of type {type(feed_forward).__name__}")
    flops += 2 * vocab_size * dim
    embedding_unused = 0 if model.config.tie_embeddings else (vocab_size - 1) * dim
    active = total - memory - embedding_unused + read_elements
    return Counts(total, active, memory, flops, values_read, bytes_read)


def memory_layer_flops(layer: MemoryLayer) -> int:
    """Matrix-product FLOPs of a memory layer for one token: query, half-key scores, gate, projection."""
    linears = (layer.query.linear, layer.gate, layer.projection)
    weights = sum(linear.weight.numel() for linear in linears if linear is not None)
    return 2 * (weights + layer.product_keys.keys.numel())
