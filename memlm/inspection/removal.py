"""A model without some of its slots, for as long as one likes; its table and parameters stay as they are."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memlm.inspection.reads import MemoryBlock, memory_blocks
from memlm.memory import MemoryLayer, MemoryPool
from memlm.transformer import Transformer


@dataclass(frozen=True)
class Removal:
    """Slots to remove.

    Args:
        pool: Name of their pool of values.
        rows: ``[n]`` integer, rows of the pool in ``[0, S)``. Of expanded values a row is removed from all
            virtual tables.
        block: Only from the memory layer of this block; None: from all layers that read the pool.
        head: Only from this head (of Engram: table); None: from all.
    """

    pool: str
    rows: Tensor
    block: int | None = None
    head: int | None = None


@contextmanager
def removed(model: Transformer, removals: Sequence[Removal], renormalise: bool = False) -> Iterator[None]:
    """Remove slots while the context lasts: whenever a token reads one, its weight is zero.

    Removed from all layers and heads, this is as if the rows of the table were zero. The other weights stay
    as they are, unless they are renormalised. Which slots a token reads does not change in that layer: no
    other slot takes the place of one that is removed. Nothing is written to the table; the next slots that
    later layers read may differ, since their input does.

    Args:
        model: In evaluation mode.
        removals: What to remove; what several name counts once.
        renormalise: Whether the remaining softmax weights of a head are divided by their sum, so that they
            sum to one again (a head without any left stays at zero). Not of Engram, which has no weights.

    Raises:
        ValueError: A pool, row, block or head does not exist, or ``renormalise`` is asked of Engram.
    """
    places = memory_blocks(model)
    for removal in removals:
        _check(removal, places)
    if renormalise and not all(isinstance(place.layer, MemoryLayer) for place in places):
        raise ValueError("the rows of Engram have no weights that could be renormalised")
    with ExitStack() as stack:
        for place in places:
            own = [r for r in removals if r.pool == place.pool and r.block in (None, place.block)]
            if own and isinstance(place.layer, MemoryLayer):
                stack.enter_context(_address_without(place.layer, place, own, renormalise))
            elif own:
                stack.enter_context(
                    place.layer.register_forward_pre_hook(_engram_hook(own, len(place.heads)))
                )
        yield


def _check(removal: Removal, places: list[MemoryBlock]) -> None:
    of_pool = [place for place in places if place.pool == removal.pool]
    if not of_pool:
        names = ", ".join(dict.fromkeys(place.pool for place in places))
        raise ValueError(f"{removal.pool!r} is no pool of values; the model has {names}")
    slots = of_pool[0].slots
    if len(removal.rows) and not 0 <= int(removal.rows.min()) <= int(removal.rows.max()) < slots:
        raise ValueError(f"rows must be from 0 to {slots - 1}, the last of the pool {removal.pool!r}")
    if removal.block is not None:
        blocks = [place.block for place in of_pool]
        if removal.block not in blocks:
            raise ValueError(f"block {removal.block} does not read {removal.pool!r}; blocks {blocks} do")
    heads = len(of_pool[0].heads)
    if removal.head is not None and not 0 <= removal.head < heads:
        raise ValueError(f"head is {removal.head}, must be from 0 to {heads - 1}")


def _named(removals: Sequence[Removal], rows: Tensor) -> Tensor:
    """Which of the reads ``[N, H, ...]`` of rows are to be removed."""
    gone = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    for removal in removals:
        wanted = removal.rows.to(rows)
        if removal.head is None:
            gone |= torch.isin(rows, wanted)
        else:
            gone[:, removal.head] |= torch.isin(rows[:, removal.head], wanted)
    return gone


@contextmanager
def _address_without(
    layer: MemoryLayer, place: MemoryBlock, removals: Sequence[Removal], renormalise: bool
) -> Iterator[None]:
    """The layer, whose ``address`` gives the removed slots a weight of zero.

    There and not at the pool, which layers share, and which sees neither heads nor virtual slots.
    """
    address, before = layer.address, vars(layer).get("address")

    def without(hidden: Tensor) -> tuple[Tensor, Tensor]:
        slots, weights = address(hidden)
        weights = weights.masked_fill(_named(removals, slots % place.slots), 0)
        if renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return slots, weights

    vars(layer)["address"] = without  # of this layer alone, over the method of its class
    try:
        yield
    finally:
        if before is None:
            del vars(layer)["address"]
        else:  # one context lay within another
            vars(layer)["address"] = before


class _PoolWithout:
    """A pool of which some rows read as zero; for Engram, which reads ``G`` rows a token one by one."""

    def __init__(self, pool: MemoryPool, removals: Sequence[Removal], tables: int) -> None:
        self._pool, self._removals, self._tables = pool, removals, tables

    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        gone = _named(self._removals, slots.view(-1, self._tables)).view_as(slots)
        return self._pool.read(slots, weights.masked_fill(gone, 0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


def _engram_hook(removals: Sequence[Removal], tables: int) -> Any:
    def replace(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, (pool,), *rest = given
        return hidden, [_PoolWithout(pool, removals, tables)], *rest

    return replace
