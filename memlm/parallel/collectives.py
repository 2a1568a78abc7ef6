"""Collectives that torch 2.13 has renamed: of the old names it warns, and torch before it has those alone."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def all_gather(taken: Tensor, own: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """All ranks' ``own`` ``[N, ...]``, one after the other, into ``taken`` ``[G * N, ...]``.

    Returns:
        What to wait for, if it is asynchronous.
    """
    return getattr(dist, _GATHER)(taken, own, group=group, async_op=async_op)


def reduce_scatter(taken: Tensor, own: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """Sums over the ranks of their ``own`` ``[G * N, ...]``; rank ``g`` gets the ``g``-th ``[N, ...]``.

    Returns:
        What to wait for, if it is asynchronous.
    """
    return getattr(dist, _REDUCE)(taken, own, group=group, async_op=async_op)
