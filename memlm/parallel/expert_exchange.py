"""Brings copies of tokens to the ranks that hold their experts, and the experts' outputs back.

Of ``G`` ranks in a group each holds ``E / G`` consecutive experts. In a layer, a rank that has chosen ``M``
pairs of a token and an expert, ``m`` of them with experts of other ranks, sends ``m`` copies of tokens (``D``
elements in the dtype that experts compute in) and ``m`` weights (fp32); for the ``n`` rows that others have
sent to it, it sends ``n`` outputs of ``D`` elements. The backward pass sends as much the other way. Before,
ranks tell each other how many rows come for each expert: ``8 E (G - 1) / G`` bytes, for which the host waits.

Weights travel, and outputs come back weighted: so no rank keeps outputs for the weights' gradient.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

Products = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows ``[M, D]`` sorted by expert, their weights ``[M]`` and the experts' ends, to outputs ``[M, D]``."""


class ExpertExchange:
    """Experts split over one group of ranks; ranks may have any numbers of tokens, and none.

    Args:
        group: Of ``G`` ranks; the one of place ``g`` holds the ``g``-th ``E / G`` experts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def apply(self, rows: Tensor, weights: Tensor, counts: Tensor, products: Products) -> Tensor:
        """Outputs of all experts for rows of this rank, wherever they are computed.

        Args:
            rows: ``[M, D]``, sorted by expert.
            weights: ``[M]``.
            counts: ``[E]`` int64: rows of each expert.
            products: Of the experts that this rank holds; called once on every rank.

        Returns:
            ``[M, D]``, in the order of ``rows``.
        """
        route = _Route(counts, self.group)
        return route.back(products(route.there(rows), route.there(weights), route.ends))

    def own(self, parameter: Tensor) -> Tensor:
        """The experts ``[E / G, ...]`` that this rank holds, of a DTensor ``[E, ...]``.

        They have the tokens of the whole group, so their gradient is a sum over its ranks. It is divided by
        their number here: FSDP2, which takes the mean over the groups, gives the mean over all ranks then.
        """
        held = cast(Any, parameter).to_local()
        return cast(Tensor, _DividedGradient.apply(held, self.group.size()))


class _Route:
    """How the rows of one forward pass get to their experts, and back."""

    def __init__(self, counts: Tensor, group: dist.ProcessGroup) -> None:
        self.group = group
        ranks = group.size()
        leaving = counts.view(ranks, -1)
        coming = torch.empty_like(leaving)
        dist.all_to_all_single(coming, leaving.contiguous(), group=group)
        self._sent, self._received = torch.stack([leaving.sum(1), coming.sum(1)]).tolist()
        # What comes is sorted by rank, then by expert; products need it sorted by expert.
        experts = torch.arange(coming.shape[1], device=counts.device).repeat(ranks)
        of_rows = experts.repeat_interleave(coming.flatten(), output_size=sum(self._received))
        self._order = of_rows.argsort(stable=True)
        self._inverse = torch.empty_like(self._order)
        self._inverse[self._order] = torch.arange(len(self._order), device=counts.device)
        self.ends = coming.sum(0).cumsum(0).to(torch.int32)
        """``[E / G]``: end of the rows of each expert that this rank holds."""

    def there(self, rows: Tensor) -> Tensor:
        """What this rank's experts get, sorted by expert."""
        return cast(Tensor, _Moved.apply(rows, self._to_experts, self._to_tokens))

    def back(self, rows: Tensor) -> Tensor:
        """What this rank had sent, in that order: the inverse, and so the gradient, of :meth:`there`."""
        return cast(Tensor, _Moved.apply(rows, self._to_tokens, self._to_experts))

    def _to_experts(self, rows: Tensor) -> Tensor:
        return self._swapped(rows, self._received, self._sent).index_select(0, self._order)

    def _to_tokens(self, rows: Tensor) -> Tensor:
        return self._swapped(rows.index_select(0, self._inverse), self._sent, self._received)

    def _swapped(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=self.group)
        return result


class _Moved(torch.autograd.Function):
    """Rows moved; their gradients are moved back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None


class _DividedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.ranks, None
