"""Plain PyTorch versions of the table's operations, on any device: the oracle of the other backends.

See :class:`memlm.kernels.interface.Backend` for shapes. Temporaries as large as the gathered rows (``M * V``)
are made in chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.kernels.interface import RowSums, slot_dtype
from memlm.kernels.update import update_rows

__all__ = [
    "best_slots",
    "candidate_pairs",
    "read_backward",
    "read_weight_gradient",
    "row_sums",
    "update_rows",
    "weighted_read",
]

# Elements of one gathered chunk. 2 M fp32 elements are 8 MB: inside a CPU's last-level cache, and
# below the 32 MB above which every fresh allocation is mapped and page-faulted anew.
_CHUNK_ELEMENTS = 2_000_000


def weighted_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See :meth:`~memlm.kernels.interface.Backend.weighted_read`."""
    dtype = _accumulator(values)
    if slots.numel() == 0:
        return values.new_zeros(slots.shape[0], values.shape[1])
    if values.dtype == dtype:
        return F.embedding_bag(slots, values, per_sample_weights=weights.to(dtype), mode="sum")
    result = values.new_empty(slots.shape[0], values.shape[1])
    for part in _chunks(slots, values.shape[1]):
        rows = values[slots[part].long()].to(dtype)
        result[part] = torch.bmm(weights[part].to(dtype).unsqueeze(1), rows).squeeze(1)
    return result


def read_weight_gradient(values: Tensor, slots: Tensor, grad_output: Tensor) -> Tensor:
    """See :meth:`~memlm.kernels.interface.Backend.read_weight_gradient`."""
    dtype = _accumulator(values)
    result = grad_output.new_empty(slots.shape, dtype=dtype)
    for part in _chunks(slots, values.shape[1]):
        rows = values[slots[part].long()].to(dtype)
        result[part] = torch.bmm(rows, grad_output[part].to(dtype).unsqueeze(-1)).squeeze(-1)
    return result


def row_sums(
    slots: Tensor,
    weights: Tensor,
    tokens: Tensor | int,
    grad_output: Tensor,
    num_slots: int,
    buffer: Tensor | None = None,
) -> RowSums:
    """See :meth:`~memlm.kernels.interface.Backend.row_sums`."""
    dtype = _accumulator(grad_output)
    if isinstance(tokens, int):
        tokens = torch.arange(slots.shape[0], device=slots.device) // tokens
    kept = slots < num_slots
    slots, weights, tokens = slots[kept], weights[kept], tokens[kept]
    ordered, order = torch.sort(slots, stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    if slots.numel() == 0:
        sums = grad_output.new_empty(0, grad_output.shape[1], dtype=dtype)
    else:
        sums = F.embedding_bag(
            tokens[order].long(),
            grad_output.to(dtype),
            offsets=counts.cumsum(0) - counts,
            per_sample_weights=weights[order].to(dtype),
            mode="sum",
        )
    return RowSums(rows, sums, sums.square().sum(1))


def read_backward(
    values: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor, buffer: Tensor | None = None
) -> tuple[Tensor, RowSums]:
    """See :meth:`~memlm.kernels.interface.Backend.read_backward`."""
    grad_weights = read_weight_gradient(values, slots, grad_output)
    tokens = max(1, slots.shape[1])
    return grad_weights, row_sums(slots.flatten(), weights.flatten(), tokens, grad_output, values.shape[0])


def candidate_pairs(reads: int) -> Tensor:
    """The pairs of ranks that can be among the top ``reads`` sums of two sorted lists.

    With both lists in descending order the pair of ranks ``(i, j)`` (from 0) is at most as large as each
    of the ``(i+1)(j+1) - 1`` pairs before it in both lists, so only pairs with ``(i+1)(j+1) <= reads``
    are candidates: 119 instead of 1,024 for 32 reads. Rounded sums keep the order, so this is exact in
    floating point too.

    Returns:
        ``[P, 2]`` int64, row-major.
    """
    pairs = [(i, j) for i in range(reads) for j in range(reads // (i + 1))]
    return torch.tensor(pairs, dtype=torch.int64)


def best_slots(first: Tensor, second: Tensor, reads: int) -> tuple[Tensor, Tensor]:
    """See :meth:`~memlm.kernels.interface.Backend.best_slots`."""
    dtype = _accumulator(first)
    best0, index0 = _top(first.to(dtype), reads)
    best1, index1 = _top(second.to(dtype), reads)
    left, right = candidate_pairs(reads).to(first.device).unbind(1)
    sums, chosen = _top(best0[..., left] + best1[..., right], reads)
    slots = index0.gather(-1, left[chosen]) * second.shape[-1] + index1.gather(-1, right[chosen])
    slots = slots.to(slot_dtype(first.shape[-1] * second.shape[-1]))
    return slots.transpose(0, 1).contiguous(), sums.transpose(0, 1).contiguous()


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, descending; a stable sort ranks equal ones by index, which torch.topk leaves open."""
    # Negated rather than sorted descending, and -0 made +0: both orders of equal numbers are then by index.
    ordered, index = torch.sort(-scores + 0.0, dim=-1, stable=True)
    return -ordered[..., :k], index[..., :k]


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(slots: Tensor, dim: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, slots.shape[1] * dim))
    return [slice(start, start + step) for start in range(0, slots.shape[0], step)]
