"""Plain PyTorch versions of the value-table operations: the working path here, the oracle elsewhere.

Shape letters: ``N`` tokens, ``L`` reads of a token (heads * reads per head), ``S`` slots, ``V`` value
dim, ``M`` reads in all, ``U`` distinct rows among them. No operation allocates memory of the table's
size: temporaries grow with the reads, and those that would be as large as the gathered rows
(``M * V``) are made in chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one gathered chunk. 2 M fp32 elements are 8 MB: inside a CPU's last-level cache, and
# below the 32 MB above which every fresh allocation is mapped and page-faulted anew.
_CHUNK_ELEMENTS = 2_000_000


def weighted_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Sum the rows that each token reads, weighted: ``out[n] = sum_l weights[n, l] * values[slots[n, l]]``.

    Args:
        values: ``[S, V]`` floating point.
        slots: ``[N, L]`` integer, each in ``[0, S)``.
        weights: ``[N, L]`` floating point; rounded to the dtype of ``values``.

    Returns:
        ``[N, V]`` in the dtype of ``values``.
    """
    if slots.numel() == 0:
        return values.new_zeros(slots.shape[0], values.shape[1])
    return F.embedding_bag(slots, values, per_sample_weights=weights.to(values.dtype), mode="sum")


def read_weight_gradient(values: Tensor, slots: Tensor, grad_output: Tensor) -> Tensor:
    """Gradient of :func:`weighted_read` with respect to its weights.

    Args:
        values: ``[S, V]``.
        slots: ``[N, L]`` integer.
        grad_output: ``[N, V]``.

    Returns:
        ``[N, L]``, ``<grad_output[n], values[slots[n, l]]>``, in the dtype of ``grad_output``.
    """
    tokens, reads = slots.shape
    result = grad_output.new_empty(tokens, reads)
    step = max(1, _CHUNK_ELEMENTS // max(1, reads * values.shape[1]))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        rows = values.index_select(0, slots[part].reshape(-1)).to(grad_output.dtype)
        rows = rows.view(-1, reads, values.shape[1])
        result[part] = torch.bmm(rows, grad_output[part].unsqueeze(-1)).squeeze(-1)
    return result


def row_gradients(
    slots: Tensor, weights: Tensor, tokens: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`weighted_read` with respect to the values, for the rows read and no others.

    The reads are sorted by slot, stably, so the order of summation, and with it every bit of the
    result, depends on the reads alone.

    Args:
        slots: ``[M]`` integer, the slot of each read.
        weights: ``[M]``, its weight.
        tokens: ``[M]`` int64, the row of ``grad_output`` it belongs to.
        grad_output: ``[N, V]``.

    Returns:
        rows: ``[U]`` int64, the distinct slots, ascending.
        sums: ``[U, V]`` their summed gradients, fp32 (fp64 for fp64 gradients).
    """
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    ordered, order = torch.sort(slots, stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    if slots.numel() == 0:
        return rows.to(torch.int64), grad_output.new_empty(0, grad_output.shape[1], dtype=dtype)
    sums = F.embedding_bag(
        tokens[order],
        grad_output.to(dtype),
        offsets=counts.cumsum(0) - counts,
        per_sample_weights=weights[order].to(dtype),
        mode="sum",
    )
    return rows.to(torch.int64), sums


def adamw_rows(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    gradients: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW on some rows of a table, in place; all other rows and moments stay as they are.

    The rows' moments decay only when the row is read (lazy moments, as in ``torch.optim.SparseAdam``),
    and so does the row's weight decay; bias correction counts the optimizer's steps.

    Args:
        values: ``[S, V]`` the table.
        exp_avg: ``[S, V]`` first moments.
        exp_avg_sq: ``[S, V]`` second moments.
        rows: ``[U]`` int64, distinct.
        gradients: ``[U, V]``.
        step: Optimizer steps taken, this one included (from 1).
        lr: Learning rate.
        betas: Decay rates of the moments, per step in which the row is read.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay: a row read shrinks by ``lr * weight_decay``.
    """
    beta1, beta2 = betas
    correction1 = 1 - beta1**step
    correction2 = (1 - beta2**step) ** 0.5
    chunk = max(1, _CHUNK_ELEMENTS // 4 // max(1, values.shape[1]))
    for start in range(0, rows.shape[0], chunk):
        index = rows[start : start + chunk]
        gradient = gradients[start : start + chunk].to(exp_avg.dtype)
        mean = exp_avg.index_select(0, index).lerp_(gradient, 1 - beta1)
        square = exp_avg_sq.index_select(0, index).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        exp_avg.index_copy_(0, index, mean)
        exp_avg_sq.index_copy_(0, index, square)
        denominator = square.sqrt_().div_(correction2).add_(eps)
        row = values.index_select(0, index).to(exp_avg.dtype).mul_(1 - lr * weight_decay)
        row.addcdiv_(mean, denominator, value=-lr / correction1)
        values.index_copy_(0, index, row.to(values.dtype))
