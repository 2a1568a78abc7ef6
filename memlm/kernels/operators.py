"""The table's operations as PyTorch operators: with fake kernels and gradients, whole under torch.compile.

Three have a gradient: ``memlm::read``, ``memlm::dot`` and ``memlm::search``. The gradient of the first two
for the table would be as large as the table; it goes to a *sink* instead, an object that the operators know
by its number, because an operator takes nothing but tensors and plain values.

Torch's FLOP counter (``torch.utils.flop_counter``) does not look into operators such as these: their formulas
stand beside them.
"""

import itertools
import math
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm.kernels.backend import select
from memlm.kernels.interface import slot_dtype

# Half scores of one piece of a search, in elements: 8 MB of fp32, which stay in a CPU's last-level cache.
_SCORE_ELEMENTS = 2_000_000


class Sink(Protocol):
    """Takes the gradient of a table's reads."""

    def take(
        self,
        values: Tensor,
        slots: Tensor,
        weights: Tensor,
        grad_output: Tensor,
        need_weights: bool,
        borrowed: bool,
    ) -> Tensor | None:
        """Keep the gradient for ``values``; return that for ``weights``, fp32, if needed.

        ``borrowed`` tensors belong to a compiled graph, which overwrites them when it is done with them.
        """
        ...


_sinks: "WeakValueDictionary[int, Sink]" = WeakValueDictionary()
_numbers = itertools.count(1)


def register_sink(sink: Sink) -> int:
    """Give a sink its number; it is forgotten with the sink."""
    number = next(_numbers)
    _sinks[number] = sink
    return number


@torch.library.custom_op("memlm::read", mutates_args=())
def read(values: Tensor, slots: Tensor, weights: Tensor, kernels: str, sink: int, borrowed: bool) -> Tensor:
    """Weighted read, see :meth:`memlm.kernels.interface.Backend.weighted_read`.

    Args:
        values: ``[S, V]``.
        slots: ``[N, L]``.
        weights: ``[N, L]``.
        kernels: See :func:`memlm.kernels.backend.select`.
        sink: Number of the sink that takes the gradient of ``values``.
        borrowed: Whether this is part of a compiled graph.
    """
    return select(values.device, kernels).weighted_read(values, slots, weights)


@read.register_fake
def _(values, slots, weights, kernels, sink, borrowed):
    return values.new_empty(slots.shape[0], values.shape[1])


@torch.library.custom_op("memlm::read_backward", mutates_args=())
def read_backward(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    kernels: str,
    sink: int,
    need_values: bool,
    need_weights: bool,
    borrowed: bool,
) -> Tensor:
    """Gradient of :func:`read` for its weights, ``[N, L]`` in their dtype; the values' goes to the sink."""
    grad_weights: Tensor | None = None
    if need_values:
        grad_weights = _sinks[sink].take(values, slots, weights, grad_output, need_weights, borrowed)
    elif need_weights:
        grad_weights = select(values.device, kernels).read_weight_gradient(values, slots, grad_output)
    return torch.zeros_like(weights) if grad_weights is None else grad_weights.to(weights.dtype)


@read_backward.register_fake
def _(values, slots, weights, grad_output, kernels, sink, need_values, need_weights, borrowed):
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


def _table_context(ctx, inputs, output):
    values, slots, factors, ctx.kernels, ctx.sink, ctx.borrowed = inputs
    ctx.save_for_backward(values, slots, factors)


def _read_gradient(ctx, grad_output):
    need_values, _, need_weights = ctx.needs_input_grad[:3]
    grad_weights = read_backward(
        *ctx.saved_tensors, grad_output, ctx.kernels, ctx.sink, need_values, need_weights, ctx.borrowed
    )
    return None, None, grad_weights if need_weights else None, None, None, None


read.register_autograd(_read_gradient, setup_context=_table_context)


@torch.library.custom_op("memlm::dot", mutates_args=())
def dot(values: Tensor, slots: Tensor, hidden: Tensor, kernels: str, sink: int, borrowed: bool) -> Tensor:
    """``out[n, l] = <hidden[n], values[slots[n, l]]>``.

    This is the gradient of a read for its weights, and its own gradient is a read and the gradient of a read
    for the table: it needs no kernels of its own, and gathers no rows.

    Args:
        values: ``[S, V]``.
        slots: ``[N, L]``.
        hidden: ``[N, V]``.
        kernels: See :func:`memlm.kernels.backend.select`.
        sink: Number of the sink that takes the gradient of ``values``.
        borrowed: Whether this is part of a compiled graph.

    Returns:
        ``[N, L]`` fp32 (fp64 for fp64 values).
    """
    return select(values.device, kernels).read_weight_gradient(values, slots, hidden)


@dot.register_fake
def _(values, slots, hidden, kernels, sink, borrowed):
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.new_empty(slots.shape, dtype=dtype)


@torch.library.custom_op("memlm::dot_backward", mutates_args=())
def dot_backward(
    values: Tensor,
    slots: Tensor,
    hidden: Tensor,
    grad_output: Tensor,
    kernels: str,
    sink: int,
    need_values: bool,
    need_hidden: bool,
    borrowed: bool,
) -> Tensor:
    """Gradient of :func:`dot` for the hidden states, in their dtype; the values' goes to the sink."""
    if need_values:
        _sinks[sink].take(values, slots, grad_output, hidden, False, borrowed)
    if not need_hidden:
        return torch.zeros_like(hidden)
    return select(values.device, kernels).weighted_read(values, slots, grad_output).to(hidden.dtype)


@dot_backward.register_fake
def _(values, slots, hidden, grad_output, kernels, sink, need_values, need_hidden, borrowed):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _dot_gradient(ctx, grad_output):
    need_values, _, need_hidden = ctx.needs_input_grad[:3]
    grad_hidden = dot_backward(
        *ctx.saved_tensors, grad_output, ctx.kernels, ctx.sink, need_values, need_hidden, ctx.borrowed
    )
    return None, None, grad_hidden if need_hidden else None, None, None, None


dot.register_autograd(_dot_gradient, setup_context=_table_context)


@register_flop_formula([torch.ops.memlm.read, torch.ops.memlm.dot])
def _table_flops(values, slots, *_, **__) -> int:
    return 2 * math.prod(slots) * values[1]


@register_flop_formula([torch.ops.memlm.read_backward, torch.ops.memlm.dot_backward])
def _table_backward_flops(
    values, slots, factors, grad_output, kernels, sink, need_values, need_factors, *_, **__
) -> int:
    return 2 * math.prod(slots) * values[1] * (need_values + need_factors)


@torch.library.custom_op("memlm::search", mutates_args=())
def search(query: Tensor, keys: Tensor, first: int, reads: int, kernels: str) -> tuple[Tensor, Tensor]:
    """The best slots among all pairs of half keys.

    Args:
        query: ``[N, H, 2, C]``.
        keys: ``[H, K0 + K1, C]``: the half keys of both sets.
        first: ``K0``.
        reads: ``R``.
        kernels: See :func:`memlm.kernels.backend.select`.

    Returns:
        scores: ``[N, H, R]`` fp32 (fp64 for fp64), descending.
        slots: ``[N, H, R]``, see :meth:`memlm.kernels.interface.Backend.best_slots`.
    """
    backend = select(query.device, kernels)
    # [H, C, K]; the matrix product runs in the query's dtype, and no autocast interferes.
    table = keys.to(query.dtype).transpose(1, 2)
    halves = (table[..., :first], table[..., first:])
    heads, width = keys.shape[:2]
    tokens = max(1, query.shape[0])
    step = max(1, _SCORE_ELEMENTS // (heads * width)) if query.device.type == "cpu" else tokens
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, tokens, step):
            part = query[start : start + step].permute(2, 1, 0, 3)
            scores = [torch.bmm(half_query, half) for half_query, half in zip(part, halves, strict=True)]
            parts.append(backend.best_slots(scores[0], scores[1], reads))
    slots, scores_of_slots = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return scores_of_slots, slots


@search.register_fake
def _(query, keys, first, reads, kernels):
    shape = (query.shape[0], query.shape[1], reads)
    slots = slot_dtype(first * (keys.shape[1] - first))
    scores = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(shape, dtype=scores), query.new_empty(shape, dtype=slots)


@torch.library.custom_op("memlm::search_backward", mutates_args=())
def search_backward(
    query: Tensor, keys: Tensor, slots: Tensor, grad_scores: Tensor, first: int, kernels: str
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`search` for query and keys, through the selected half keys alone.

    The score of a slot is ``<query half 0, half key i> + <query half 1, half key j>``: for the query that is
    a weighted read of the half keys, and for the half keys a sum of queries by row, as for the value table.
    """
    backend = select(query.device, kernels)
    heads, width, dim = keys.shape
    reads = slots.shape[2]
    second = width - first
    head = torch.arange(heads, device=slots.device, dtype=slots.dtype).view(1, heads, 1) * width
    rows = torch.stack((slots // second + head, slots % second + (head + first)), dim=2).flatten(0, 2)
    weights = grad_scores.unsqueeze(2).expand(-1, -1, 2, -1).reshape(rows.shape)
    grad_query = backend.weighted_read(keys.flatten(0, 1), rows, weights)
    sums = backend.row_sums(rows.flatten(), weights.flatten(), reads, query.reshape(-1, dim), heads * width)
    # Where the number of rows is known on the device only, the rows beyond it go to one row that is cut off.
    grad_keys = torch.zeros(heads * width + 1, dim, dtype=sums.sums.dtype, device=keys.device)
    chosen = sums.rows.long()
    if sums.count is not None:
        beyond = torch.arange(chosen.shape[0], device=chosen.device) >= sums.count
        chosen = chosen.masked_fill(beyond, heads * width)
    grad_keys.index_copy_(0, chosen, sums.sums)
    return grad_query.view(query.shape).to(query.dtype), grad_keys[:-1].view(keys.shape).to(keys.dtype)


@search_backward.register_fake
def _(query, keys, slots, grad_scores, first, kernels):
    return torch.empty_like(query, memory_format=torch.contiguous_format), torch.empty_like(keys)


def _search_context(ctx, inputs, output):
    query, keys, ctx.first, _, ctx.kernels = inputs
    _, slots = output
    ctx.save_for_backward(query, keys, slots)
    ctx.mark_non_differentiable(slots)


def _search_gradient(ctx, grad_scores, _):
    grad_query, grad_keys = search_backward(*ctx.saved_tensors, grad_scores, ctx.first, ctx.kernels)
    return grad_query, grad_keys, None, None, None


search.register_autograd(_search_gradient, setup_context=_search_context)


@register_flop_formula(torch.ops.memlm.search)
def _search_flops(query, keys, *_, **__) -> int:
    return 2 * query[0] * math.prod(keys)


@register_flop_formula(torch.ops.memlm.search_backward)
def _search_backward_flops(query, keys, slots, *_, **__) -> int:
    """A multiply-add for the query and one for the keys, for each element of the half keys selected."""
    return 2 * 2 * (2 * math.prod(slots) * keys[2])
