"""Bytes that a rank sends in an optimizer step, by formulas.

The convention, here and wherever bytes are counted, for a group of ``n`` ranks: what a rank sends to others.

- All-gather of ``b`` bytes of each rank: ``b (n - 1)``, once around a ring.
- Reduce-scatter of ``b`` bytes to ``b / n`` on each rank: ``b (n - 1) / n``.
- All-to-all of ``b`` bytes on each rank: ``b (n - 1) / n``, the rank's own part stays; of uneven parts, those
  of the others.
- All-reduce of ``b`` bytes: ``2 b (n - 1) / n``, a reduce-scatter and an all-gather.

What is received is as much, added up over all ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from memlm.kernels.interface import slot_dtype
from memlm.memory import MemoryLayer, MemoryPool
from memlm.parallel.dense_split import share
from memlm.parallel.expert_split import split_experts
from memlm.parallel.expert_traffic import Routed, expert_matrices, expert_rows
from memlm.parallel.row_exchange import MERGE_WHOLE_ABOVE, SHARE_WHOLE_ABOVE
from memlm.rank_memory import Mesh, reads_per_token
from memlm.transformer import Block, Transformer

_FLAG = 1
"""Bytes of the mark whether a row sent with all others is touched."""


def gathered(size: float, ranks: int) -> float:
    """Bytes sent in an all-gather, with ``size`` bytes on each of the ranks before it."""
    return size * (ranks - 1)


def scattered(size: float, ranks: int) -> float:
    """Bytes sent in a reduce-scatter or an even all-to-all of ``size`` bytes on each of the ranks."""
    return size * (ranks - 1) / ranks


def reduced(size: float, ranks: int) -> float:
    """Bytes sent in an all-reduce of ``size`` bytes."""
    return 2 * scattered(size, ranks)


@dataclass(frozen=True)
class Rows:
    """Rows of one pool that a rank exchanges with its replicas in a step."""

    read: float
    """Rows that the group that has read most has read: they decide whether all are sent."""
    leaving: float
    """Rows that the rank's group has read and that another replica owns."""
    owned: float
    """Rows that the rank owns and any group has read."""
    most_owned: float
    """The largest ``owned`` of all replicas: the others' parts are padded to it."""

    @classmethod
    def at_most(cls, slots: int, reads: int, groups: int) -> "Rows":
        """Where every read of a step is of another row, as long as there are any.

        Skewed reads touch fewer rows; uniform ones of many more than there are slots, all.

        Args:
            slots: ``S``, rows of the table.
            reads: Of one group.
            groups: ``D``, number of replicas.
        """
        owned = min(reads * groups, slots) / groups
        read = min(reads, slots)
        return cls(read, read * (groups - 1) / groups, owned, owned)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in an optimizer step. Scalars, such as norms and counts, are left out."""

    reads_forward: float
    """Within the memory group: slots and weights to all, columns of the answers back."""
    reads_backward: float
    """Within the memory group: columns of the answers' gradients, and the gradients of the weights."""
    row_gradients: float
    """Between groups: sums of the rows to their owners. Within a group: their squares."""
    rows: float
    """Between groups: updated rows to all replicas."""
    dense_weights: float
    """All-gathers of the other parameters, where they are split."""
    dense_gradients: float
    """Their reduce-scatters where they are split, else an all-reduce."""
    experts: float
    """Within the expert group: copies of tokens to their experts, outputs back, and the gradients of both."""
    batch_norms: float
    """Means and variances over all ranks, and their gradients."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    def as_dict(self) -> dict[str, int]:
        """Plain dict with the total, for JSON."""
        return {name: round(size) for name, size in {**asdict(self), "total": self.total}.items()}


def traffic(
    model: Transformer,
    mesh: Mesh,
    tokens: int,
    micro_batches: int = 1,
    rows: Mapping[str, Rows] | None = None,
    autocast: torch.dtype | None = None,
    routed: Mapping[int, Routed] | None = None,
) -> Traffic:
    """Count what a rank sends; works on the meta device.

    Without activation checkpointing, which sends what the forward pass sends once more.

    Args:
        model: In the dtypes that it trains in, not yet split.
        mesh: How it is spread.
        tokens: Tokens of one rank in an optimizer step, ``N``.
        micro_batches: Forward passes of a step; split parameters are gathered anew in each, and unless the
            mesh says ``whole_gradients``, their gradients scattered.
        rows: Rows exchanged, of each pool; otherwise at most, as :meth:`Rows.at_most` has it.
        autocast: What autocast computes products in, None for none.
        routed: Rows that experts exchange, of each block; otherwise those of even loads.
    """
    pools = {name: cast(MemoryPool, pool) for name, pool in model.pools.items()}
    groups = mesh.ranks // mesh.memory_group
    per_token = reads_per_token(model)
    forward = backward = 0.0
    for block in cast(Iterable[Block], model.blocks):
        there, back = _reads(block, pools, mesh)
        forward, backward = forward + there * tokens, backward + back * tokens
    gradients = returned = 0.0
    for name, pool in pools.items():
        if not pool.values.requires_grad:
            continue
        reads = per_token[name] * tokens * mesh.memory_group
        counts = rows[name] if rows is not None else Rows.at_most(pool.slots, reads, groups)
        there, back = _rows(pool, counts, mesh)
        gradients, returned = gradients + there, returned + back
    weights, dense = _dense(model, {id(pool.values) for pool in pools.values()}, mesh, micro_batches)
    experts = expert_rows(model, mesh, tokens, micro_batches, autocast, routed)
    norms = _batch_norms(model, mesh) * micro_batches
    return Traffic(forward, backward, gradients, returned, weights, dense, experts, norms)


def _reads(block: Block, pools: Mapping[str, MemoryPool], mesh: Mesh) -> tuple[float, float]:
    """Bytes of one token, in the forward and in the backward pass of one block's memory."""
    if not block.pool_names:
        return 0.0, 0.0
    layer, ranks = cast(nn.Module, block.memory), mesh.memory_group
    reads = cast(int, layer.rows_read)
    values, *down = (pools[name] for name in block.pool_names)
    wide = torch.promote_types(_dtype(block), torch.float32)
    expansion = layer.value_expansion if isinstance(layer, MemoryLayer) else 1
    slots = gathered(reads * slot_dtype(values.slots * expansion).itemsize, ranks)
    weights = gathered(reads * _wire(wide, mesh), ranks)
    # Engram's rows are joined, not added: there are as many answers as reads.
    bags = expansion if isinstance(layer, MemoryLayer) else reads
    answers = scattered(bags * values.value_dim * _wire(values.values.dtype, mesh), ranks)
    forward = slots + weights + answers
    backward = answers
    if isinstance(layer, MemoryLayer):  # the others' weights are ones, without gradient
        backward += weights  # a reduce-scatter sends what its all-gather has sent
    for pool in down:
        kind = torch.promote_types(pool.values.dtype, torch.float32)
        products = gathered(reads * _wire(kind, mesh), ranks)
        hidden = scattered(pool.value_dim * _wire(_dtype(block), mesh), ranks)
        forward += hidden + products  # the slots are those of the values
        backward += hidden + products
    return forward, backward


def _rows(pool: MemoryPool, rows: Rows, mesh: Mesh) -> tuple[float, float]:
    """Bytes of the row gradients of a pool, and of its updated rows.

    Above a share of the table all rows are sent; the padding of the last stretch of them is left out.
    """
    group, groups = mesh.memory_group, mesh.ranks // mesh.memory_group
    wide = torch.promote_types(pool.values.dtype, torch.float32)
    of_sum = pool.value_dim / group * _wire(wide, mesh)
    of_row = pool.value_dim / group * pool.values.itemsize
    of_number = slot_dtype(pool.slots).itemsize
    block = -(-pool.slots // groups)
    if rows.read > MERGE_WHOLE_ABOVE * pool.slots:
        sums = gathered(block * (of_sum + _FLAG), groups)
    else:
        sums = rows.leaving * (of_sum + of_number) if groups > 1 else 0.0
    if rows.most_owned > SHARE_WHOLE_ABOVE * block:
        shared = gathered(block * of_row, groups)
    else:
        shared = gathered(rows.most_owned * (of_row + of_number), groups)
    return sums + reduced(rows.owned * wide.itemsize, group), shared


def _wire(dtype: torch.dtype, mesh: Mesh) -> int:
    """Bytes of a number that memory sends."""
    wire = mesh.wire_dtype
    return dtype.itemsize if wire is None else min(dtype.itemsize, wire.itemsize)


def _dtype(block: nn.Module) -> torch.dtype:
    """The dtype of a block's parameters, and of its input: autocast leaves the residual stream as it is."""
    return next(block.parameters()).dtype


def _dense(model: Transformer, tables: set[int], mesh: Mesh, micro_batches: int) -> tuple[float, float]:
    """Bytes of the parameters that are not value tables, and of their gradients."""
    if not mesh.shard_dense:
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
        return 0.0, reduced(sum(map(_size, trained)), mesh.ranks)
    weights, gradients = expert_matrices(model, mesh)
    seen = tables | split_experts(model, mesh.expert_group).keys()
    for unit in (*model.blocks, model):
        own = [p for p in unit.parameters() if id(p) not in seen]
        seen |= {id(parameter) for parameter in own}
        # Blocks are given up after the forward pass, and gathered again.
        times = 1 if unit is model else 2
        weights += times * gathered(sum(_share(p, mesh.ranks) for p in own), mesh.ranks)
        gradients += gathered(sum(_share(p, mesh.ranks) for p in own if p.requires_grad), mesh.ranks)
    return weights * micro_batches, gradients * (1 if mesh.whole_gradients else micro_batches)


def _batch_norms(model: nn.Module, mesh: Mesh) -> float:
    """Bytes of the statistics of one forward and backward pass."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    return sum(4 * reduced(norm.num_features * 4, mesh.ranks) for norm in norms)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _share(tensor: Tensor, ranks: int) -> int:
    """Bytes of a rank's part, padded to the largest."""
    return share(tensor.shape, ranks) * tensor.element_size()
