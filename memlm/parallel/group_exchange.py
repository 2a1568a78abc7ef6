"""What a memory layer sends within its group: slots and weights out, columns of the answers back.

With ``G`` ranks in a group, ``N`` tokens on each, ``L`` reads of a token and values of ``V`` elements, a
read sends from each rank to every other its ``N * L`` slots and weights, and ``N * V / G`` elements of the
answers; backward as much as that less the slots. (Memory Layers at Scale, section 3.1; there too the values
are split along the value dim.)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch before 2.13 has these under their old names, of which later ones warn.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"

Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


class GroupExchange:
    """Collectives of one group, each with its gradient; all ranks have equally many tokens.

    Args:
        group: Of ``G`` ranks.

    Attributes:
        size: ``G``.
        rank: This rank's place in the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' ``[N, ...]`` one after the other, ``[G * N, ...]``; their gradients are summed."""
        return _WithGradient.apply(x, self.group, _gather, _sum_and_scatter)

    def sum_to_tokens(self, x: Tensor) -> Tensor:
        """Sums over the ranks of what each has for all tokens ``[G * N, ...]``, of its own ``[N, ...]``."""
        return _WithGradient.apply(x, self.group, _sum_and_scatter, _gather)

    def columns_to_tokens(self, x: Tensor) -> Tensor:
        """Its columns of all tokens ``[G * N, V / G]`` to all columns of its own tokens ``[N, V]``."""
        blocks = self._swapped(x)
        return blocks.view(self.size, -1, x.shape[1]).transpose(0, 1).flatten(1)

    def tokens_to_columns(self, x: Tensor) -> Tensor:
        """The inverse: all columns of its own tokens ``[N, V]`` to its columns of all tokens."""
        return self._swapped(x.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1))

    def _swapped(self, x: Tensor) -> Tensor:
        """Block ``g`` here becomes block ``r`` of rank ``g``, where this is rank ``r``: its own inverse."""
        return _WithGradient.apply(x, self.group, _swap, _swap)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    getattr(dist, _GATHER)(result, x.contiguous(), group=group)
    return result


def _sum_and_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    getattr(dist, _REDUCE)(result, x.contiguous(), group=group)
    return result


def _swap(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result, x.contiguous(), group=group)
    return result


class _WithGradient(torch.autograd.Function):
    """A collective, and the one that is its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, collective: Collective, gradient: Collective
    ) -> Tensor:
        ctx.group, ctx.gradient = group, gradient
        return collective(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient(gradients[0], ctx.group), None, None, None
