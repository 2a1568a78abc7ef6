"""What a memory layer sends within its group: slots and weights out, columns of the answers back.

With ``G`` ranks in a group, ``N`` tokens on each, ``L`` reads of a token and values of ``V`` elements, a
read sends from each rank to every other its ``N * L`` slots and weights, and ``N * V / G`` elements of the
answers; backward as much as that less the slots. (Memory Layers at Scale, section 3.1; there too the values
are split along the value dim.)

Nothing waits before it must. A collective is two nodes of the autograd graph: forward the first begins it and
the second waits for it, and backward the second begins that of the gradient, for which the first waits. What
a layer does between the two, autograd does between them, too, for it takes what was made last first.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memlm.memory.exchange import Arriving
from memlm.parallel.collectives import all_gather, reduce_scatter

Collective = Callable[[Tensor], Arriving]


class GroupExchange:
    """Collectives of one group, each with its gradient; all ranks have equally many tokens.

    Each begins when it is called, and what it returns waits for it, once. Sums are added up in fp32.

    Args:
        group: Of ``G`` ranks.
        wire_dtype: What wider floating-point numbers travel as; default: as they are.

    Attributes:
        size: ``G``.
        rank: This rank's place in the group.
    """

    def __init__(self, group: dist.ProcessGroup, wire_dtype: torch.dtype | None = None) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.wire_dtype = wire_dtype

    def gather(self, x: Tensor) -> Arriving:
        """All ranks' ``[N, ...]`` one after the other, ``[G * N, ...]``; their gradients are summed."""
        return self._begin(x, self._gather, self._sum_and_scatter)

    def sum_to_tokens(self, x: Tensor) -> Arriving:
        """Sums over the ranks of what each has for all tokens ``[G * N, ...]``, of its own ``[N, ...]``."""
        return self._begin(x, self._sum_and_scatter, self._gather)

    def columns_to_tokens(self, x: Tensor) -> Arriving:
        """Its columns of all tokens ``[G * N, V / G]`` to all columns of its own tokens ``[N, V]``."""
        return self._begin(x, self._to_tokens, self._to_columns)

    def tokens_to_columns(self, x: Tensor) -> Arriving:
        """The inverse: all columns of its own tokens ``[N, V]`` to its columns of all tokens."""
        return self._begin(x, self._to_columns, self._to_tokens)

    def _begin(self, x: Tensor, forward: Collective, backward: Collective) -> Arriving:
        return (lambda: x) if self.size == 1 else self._under_way(x, forward, backward)

    # Compilers cannot look into what is under way.
    @torch.compiler.disable
    def _under_way(self, x: Tensor, forward: Collective, backward: Collective) -> Arriving:
        flight = _Flight(forward, backward)
        begun = _Begin.apply(x, flight)
        return torch.compiler.disable(lambda: _Finish.apply(begun, flight))

    # -- helpers: without gradient. What they return holds the tensors under way until it is called.

    def _gather(self, x: Tensor) -> Arriving:
        sent = self._on_the_wire(x).contiguous()
        taken = sent.new_empty(self.size * len(x), *x.shape[1:])
        work = all_gather(taken, sent, self.group, async_op=True)
        return lambda: _waited(work, sent, taken).to(x.dtype)

    def _sum_and_scatter(self, x: Tensor) -> Arriving:
        sent = self._on_the_wire(x)
        if sent.dtype != x.dtype:  # as many bytes, but partial sums are not rounded
            blocks = self._swap(sent)
            return lambda: blocks().unflatten(0, (self.size, -1)).sum(0, dtype=x.dtype)
        sent = x.contiguous()
        taken = x.new_empty(len(x) // self.size, *x.shape[1:])
        work = reduce_scatter(taken, sent, self.group, async_op=True)
        return lambda: _waited(work, sent, taken)

    def _to_tokens(self, x: Tensor) -> Arriving:
        blocks = self._swap(self._on_the_wire(x))
        return lambda: blocks().unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1).to(x.dtype)

    def _to_columns(self, x: Tensor) -> Arriving:
        blocks = self._swap(self._on_the_wire(x).unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1))
        return lambda: blocks().to(x.dtype)

    def _swap(self, x: Tensor) -> Arriving:
        """Block ``g`` here becomes block ``r`` of rank ``g``, where this is rank ``r``: its own inverse."""
        sent = x.contiguous()
        taken = torch.empty_like(sent)
        work = dist.all_to_all_single(taken, sent, group=self.group, async_op=True)
        return lambda: _waited(work, sent, taken)

    def _on_the_wire(self, x: Tensor) -> Tensor:
        return x if self.wire_dtype is None else narrowed(x, self.wire_dtype)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype if it takes fewer bytes and the tensor is of floating point; else as it is."""
    return x.to(dtype) if x.is_floating_point() and x.itemsize > dtype.itemsize else x


def _waited(work: Any, sent: Tensor, taken: Tensor) -> Tensor:
    """What has been taken once it is; until then, nobody else has it, and what is sent is not given up."""
    work.wait()
    return taken


class _Flight:
    """What the two nodes of a collective hand each other: what is on its way, forward and backward."""

    def __init__(self, forward: Collective, backward: Collective) -> None:
        self.forward, self.backward = forward, backward
        self._arriving: Arriving | None = None

    def begin(self, collective: Collective, x: Tensor) -> None:
        self._arriving = collective(x)

    def arrive(self) -> Tensor:
        arriving, self._arriving = self._arriving, None
        assert arriving is not None
        return arriving()


class _Begin(torch.autograd.Function):
    """Begins a collective; gives an empty tensor, by which autograd knows the order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.begin(flight.forward, x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.arrive(), None


class _Finish(torch.autograd.Function):
    """Waits for it; backward begins that of the gradient."""

    @staticmethod
    def forward(ctx: Any, begun: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.flight.begin(ctx.flight.backward, gradients[0])
        return gradients[0].new_empty(0), None
