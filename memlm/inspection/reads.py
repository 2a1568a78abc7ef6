"""Which slots every token reads: per memory layer and head, with weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from memlm.memory import EngramLayer, Inputs, MemoryLayer, MemoryPool
from memlm.transformer import Transformer


class MemoryBlock(NamedTuple):
    """A memory layer with its place."""

    block: int
    """Index of its block, from 0."""
    layer: MemoryLayer | EngramLayer
    pool: str
    """Name of its pool of values."""
    slots: int
    """``S``, rows of that pool."""

    @property
    def heads(self) -> tuple[str, ...]:
        """A name for each of its ``H`` heads; of Engram, for each of its ``G`` tables."""
        if isinstance(self.layer, MemoryLayer):
            return tuple(f"head {head}" for head in range(self.layer.product_keys.heads))
        names: list[str] = []
        orders = [sum(map(bool, column)) for column in zip(*self.layer.hashes.multipliers, strict=True)]
        for table, order in enumerate(orders):
            names.append(f"{order}-gram {table - orders.index(order)}")
        return tuple(names)

    @property
    def by_ngrams(self) -> bool:
        """Whether it is an Engram layer, whose rows have no weights but a gate."""
        return isinstance(self.layer, EngramLayer)

    @property
    def virtual_tables(self) -> int:
        """``E``: above 1 if values are expanded."""
        return self.layer.value_expansion if isinstance(self.layer, MemoryLayer) else 1

    @property
    def short_heads(self) -> tuple[str, ...]:
        """The same for narrow columns: ``h0``, or ``2g0``."""
        return tuple(name.replace("head ", "h").replace("-gram ", "g") for name in self.heads)


@dataclass(frozen=True)
class LayerReads:
    """What a memory layer reads for ``N`` tokens.

    Of Engram ``H`` is the number of tables ``G``, ``R`` is 1, and the weight of every row of a token is that
    token's gate: by it the layer decides how much of its rows to add.
    """

    place: MemoryBlock
    hidden: Tensor
    """``[N, D]``, the layer's input."""
    slots: Tensor
    """``[N, H, R]`` int64; virtual slots, if values are expanded. By descending weight."""
    weights: Tensor
    """``[N, H, R]``: softmax weights, that sum to one over the reads of a head; the gate of Engram."""
    activations: Tensor | None
    """``[N, H, R]``: of the slots' neurons (PEER), which multiply the weights; None without pre-values."""

    @property
    def rows(self) -> Tensor:
        """``[N, H, R]`` rows of the pool, in ``[0, S)``."""
        return self.slots % self.place.slots

    @property
    def tables(self) -> Tensor:
        """``[N, H, R]`` virtual tables of the reads; zeros, if values are not expanded."""
        return self.slots // self.place.slots

    @property
    def factors(self) -> Tensor:
        """``[N, H, R]`` what the rows are multiplied by before they are added: weight times activation."""
        return self.weights if self.activations is None else self.weights * self.activations

    @property
    def entropy(self) -> Tensor:
        """``[N, H]`` entropy of a head's weights, nats."""
        total = self.weights.sum(-1, keepdim=True).clamp(min=torch.finfo(self.weights.dtype).tiny)
        return torch.special.entr(self.weights / total).sum(-1)

    @property
    def effective(self) -> Tensor:
        """``[N, H]`` effective number of slots: the exponential of the entropy, from 1 to ``R``."""
        return self.entropy.exp()

    @property
    def concentration(self) -> Tensor:
        """``[N, H]`` the largest weight of a head: 1 if it reads one slot alone, ``1 / R`` if all alike."""
        return self.weights.amax(-1)


def memory_blocks(model: Transformer) -> list[MemoryBlock]:
    """The memory layers of a model, by ascending block.

    Raises:
        ValueError: The model has none.
    """
    found = []
    for index, block in enumerate(cast(Any, model.blocks)):
        if block.memory is not None:
            pool = block.pool_names[0]
            found.append(MemoryBlock(index, block.memory, pool, cast(MemoryPool, model.pools[pool]).slots))
    if not found:
        raise ValueError("the model has no memory layers, whose slots could be looked at")
    return found


@contextmanager
def recorded(model: Transformer) -> Iterator[list[LayerReads]]:
    """Record what the memory layers read while the context lasts.

    The model's outputs are the same; its layers are addressed once more.

    Args:
        model: In evaluation mode.

    Yields:
        A list to which every forward pass adds one entry a memory layer, by ascending block. Clear it between
        passes to keep memory bounded.

    Raises:
        ValueError: The model has no memory.
    """
    found: list[LayerReads] = []
    with ExitStack() as stack:
        for place in memory_blocks(model):
            stack.enter_context(place.layer.register_forward_pre_hook(partial(_record, place, found)))
        yield found


@torch.no_grad()
def reads_of(model: Transformer, tokens: list[int]) -> list[LayerReads]:
    """What the memory layers read for the tokens of one text.

    Args:
        model: In evaluation mode.
        tokens: ``N`` token ids, the first of which begins a document.

    Returns:
        One entry a memory layer, by ascending block.

    Raises:
        ValueError: There is no token, or the model has no memory.
    """
    if not tokens:
        raise ValueError("there is no token to read for")
    with recorded(model) as found:
        model(torch.tensor([tokens], device=model.embedding.weight.device))
    return found


@torch.no_grad()
def _record(place: MemoryBlock, found: list[LayerReads], layer: nn.Module, given: tuple[Any, ...]) -> None:
    hidden, pools, inputs = given[:3]
    tokens = hidden.flatten(0, -2)
    activations = None
    if isinstance(layer, MemoryLayer):
        slots, weights = layer.address(tokens)
        if layer.activation is not None:
            dots = pools[1].dot((slots % place.slots).flatten(1), tokens)
            activations = layer.activation(dots).view(slots.shape)
    else:
        slots, weights = _engram_reads(cast(EngramLayer, layer), hidden, pools[0], inputs)
    found.append(LayerReads(place, tokens, slots.long(), weights, activations))


def _engram_reads(
    layer: EngramLayer, hidden: Tensor, pool: MemoryPool, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """Slots and gates ``[N, G, 1]``: of the gate all rows of a token have the same."""
    slots = layer.address(inputs)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = pool.read(slots.view(-1, 1), torch.ones(slots.numel(), 1, dtype=wide, device=slots.device))
    key = layer.key(rows.view(*hidden.shape[:-1], -1).to(hidden.dtype))
    logit = (layer.hidden_norm(hidden) * layer.key_norm(key)).sum(-1, dtype=wide)
    gate = (logit * hidden.shape[-1] ** -0.5).sigmoid()
    return slots.unsqueeze(-1), gate.view(-1, 1, 1).expand(-1, slots.shape[1], 1)
