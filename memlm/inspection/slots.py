"""Slots by name, and those to which tokens give the largest weights."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlm.inspection.reads import LayerReads, memory_blocks, reads_of
from memlm.transformer import Transformer


class Slot(NamedTuple):
    """A row of a pool of values."""

    pool: str
    row: int


class WeightedSlot(NamedTuple):
    """A slot with the weight that some tokens give it."""

    slot: Slot
    weight: float
    """Sum of ``|factor|`` (see :attr:`LayerReads.factors`) over tokens, heads and layers of the pool."""


def heaviest_slots(
    reads: Sequence[LayerReads], count: int, pool: str | None = None, last: int | None = None
) -> list[WeightedSlot]:
    """The slots to which tokens give the largest weights.

    Args:
        reads: Of :func:`memlm.inspection.reads.reads_of`.
        count: Most slots.
        pool: Only of this pool; None: of all, compared by weight.
        last: Only what so many last tokens read; None: all tokens.

    Returns:
        By descending weight.
    """
    sums: dict[Slot, float] = {}
    for name in dict.fromkeys(layer.place.pool for layer in reads):
        if pool not in (None, name):
            continue
        own = [layer for layer in reads if layer.place.pool == name]
        rows = torch.cat([_last(layer.rows, last).flatten() for layer in own])
        sizes = torch.cat([_last(layer.factors, last).abs().double().flatten() for layer in own])
        distinct, place = rows.unique(return_inverse=True)
        totals = torch.zeros(len(distinct), dtype=torch.float64, device=rows.device).index_add_(
            0, place, sizes
        )
        best = totals.topk(min(count, len(totals)))
        chosen = zip(distinct[best.indices].tolist(), best.values.tolist(), strict=True)
        sums |= {Slot(name, row): weight for row, weight in chosen}
    ordered = sorted(sums.items(), key=lambda item: -item[1])[:count]
    return [WeightedSlot(slot, weight) for slot, weight in ordered]


def _last(x: Tensor, last: int | None) -> Tensor:
    return x if last is None else x[-last:]


def check_slots(model: Transformer, slots: Iterable[Slot]) -> None:
    """Refuse slots that a model does not have.

    Raises:
        ValueError: Says which slots or pools there are.
    """
    sizes = {place.pool: place.slots for place in memory_blocks(model)}
    for pool, row in slots:
        if pool not in sizes:
            raise ValueError(f"{pool!r} is no pool of values; the model has {', '.join(sizes)}")
        if not 0 <= row < sizes[pool]:
            raise ValueError(f"{row} is no slot of the pool {pool!r}, whose are 0 to {sizes[pool] - 1}")


def slots_of(
    model: Transformer, tokens: list[int], count: int, pool: str | None = None, last: int | None = None
) -> list[Slot]:
    """The slots that a prompt gives the largest weights; arguments as of :func:`heaviest_slots`."""
    return [found.slot for found in heaviest_slots(reads_of(model, tokens), count, pool, last)]
