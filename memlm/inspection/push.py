"""Which next tokens a slot makes likelier: a logit lens of its row."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.inspection.reads import LayerReads, MemoryBlock, memory_blocks
from memlm.inspection.slots import Slot
from memlm.memory import EngramLayer, MemoryLayer, MemoryPool
from memlm.transformer import Transformer


class Push(NamedTuple):
    """Which next tokens a row makes likelier, as one layer reads it."""

    block: int
    table: int
    """Virtual table; 0 without value expansion."""
    in_corpus: bool
    """Whether gate and activation are the mean of those in the corpus; else the gate is taken as one."""
    tokens: list[tuple[int, float]]
    """Token ids, the likeliest first, each with the standard deviations of its logit above the mean of all
    tokens' logits."""


class MeanFactor:
    """The mean of what a row is multiplied by, elementwise, weighted by size."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.sizes = 0.0

    def add(self, factors: Tensor, gates: Tensor | None) -> None:
        """Reads ``[M]`` and their gates ``[M, V]``."""
        factors = factors.double()
        self.sizes += float(factors.abs().sum())
        gated = factors.sum() if gates is None else factors @ gates.double()
        self.total = self.total + gated

    @property
    def mean(self) -> Tensor | float:
        return self.total / max(self.sizes, 1e-30)


def gates_of(layer: LayerReads, tokens: Tensor) -> Tensor | None:
    """``[M, V]`` what the read of these tokens is multiplied by, elementwise."""
    gate = getattr(layer.place.layer, "gate", None)
    return None if gate is None else F.silu(gate(layer.hidden[tokens]))


def pushes_of(
    model: Transformer, slot: Slot, means: dict[tuple[int, int], MeanFactor], vocabulary: int, top: int
) -> list[Push]:
    """What a slot pushes, by block and virtual table.

    Args:
        model: The model.
        slot: Of one of its pools.
        means: What the row was multiplied by in a corpus, by block and virtual table; empty if the corpus
            never read it.
        vocabulary: Tokens of the tokenizer.
        top: Most tokens of a push.
    """
    places = {place.block: place for place in memory_blocks(model) if place.pool == slot.pool}
    wanted: dict[tuple[int, int], Tensor | float] = {key: mean.mean for key, mean in sorted(means.items())}
    if not wanted:
        wanted = {
            (block, table): 1.0 for block, place in places.items() for table in range(place.virtual_tables)
        }
    return [
        Push(
            block, table, bool(means), pushed(model, slot.row, places[block], factor, table, vocabulary, top)
        )
        for (block, table), factor in wanted.items()
    ]


@torch.no_grad()
def pushed(
    model: Transformer,
    row: int,
    place: MemoryBlock,
    factor: Tensor | float,
    table: int,
    vocabulary: int,
    top: int,
) -> list[tuple[int, float]]:
    """Next tokens that a row makes likelier: a "logit lens" of what a layer adds to the residual stream.

    The row, times ``factor``, goes through the layer's projection, the gain of the final norm and the output
    layer, as if nothing came between them: what later blocks make of it is left out, and so are the biases
    and Engram's convolution. The size of such logits means little, their order does: each is given as
    standard deviations above their mean.

    Args:
        model: The model.
        row: Of the pool.
        place: A memory layer that reads the pool.
        factor: What the row is multiplied by before the projection: a number, or ``[V]`` (the gate).
        table: Virtual table.
        vocabulary: Tokens of the tokenizer.
        top: Most tokens; only such above the mean are given.

    Returns:
        Token ids and standard deviations, the highest first; none if the row adds nothing.
    """
    pool, layer = cast(MemoryPool, model.pools[place.pool]), place.layer
    device = model.output.weight.device
    one = torch.ones(1, 1, device=device)
    value = pool.read(torch.tensor([[row]], device=device), one)[0].double() * factor
    if isinstance(layer, EngramLayer):
        start = _table_of(layer, row) * len(value)
        added = layer.value.weight[:, start : start + len(value)].double() @ value
    elif isinstance(layer, MemoryLayer) and layer.projection is not None:
        start = table * len(value)
        added = layer.projection.weight[:, start : start + len(value)].double() @ value
    else:
        added = value
    logits = model.output((added * model.norm.weight.double()).to(model.output.weight.dtype))
    logits = logits[:vocabulary].double()
    logits = logits - logits.mean()
    deviation = float(logits.std(correction=0))
    if not deviation > 0:
        return []
    best = (logits / deviation).topk(min(top, len(logits)))
    chosen = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(token, score) for token, score in chosen if score > 0]


def _table_of(layer: EngramLayer, row: int) -> int:
    """Which of the tables, that lie one after the other, has a row."""
    for table, size in enumerate(layer.hashes.sizes):
        if row < size:
            return table
        row -= size
    raise AssertionError("rows are checked before")
