"""Reads of the table and their gradients on the CPU, compiled by numba.

All work is split in parts whose size depends on the input alone, and no sum crosses a part but in a fixed
order: the results are the same, to the bit, on any number of threads.
"""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from memlm.kernels import reference
from memlm.kernels.interface import RowSums
from memlm.kernels.numba_bf16 import as_float32
from memlm.kernels.numba_prefetch import prefetch_row
from memlm.kernels.numba_threads import torch_threads

# Sorted reads of one task. A row read more often is shared by several tasks.
_TASK_READS = 2048
# The sorted keys keep a slot in the upper half of an int64.
_MOST_SLOTS = 2**31
# Reordering of sums is fixed when a kernel is compiled; it depends on the value dim only.
_FAST = {"reassoc", "nsz", "contract", "arcp"}


def weighted_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See :meth:`memlm.kernels.interface.Backend.weighted_read`."""
    if values.dtype == torch.bfloat16 and slots.numel():
        # torch's own wants bf16 weights.
        result = torch.empty(slots.shape[0], values.shape[1], dtype=torch.float32)
        with torch_threads():
            _read(_table(values), _array(slots), _array(weights.float()), result.numpy())
        return result.bfloat16()
    return reference.weighted_read(values, slots, weights)


def read_weight_gradient(values: Tensor, slots: Tensor, grad_output: Tensor) -> Tensor:
    """See :meth:`memlm.kernels.interface.Backend.read_weight_gradient`."""
    if values.dtype == torch.float64:
        return reference.read_weight_gradient(values, slots, grad_output)
    result = torch.empty(slots.shape, dtype=torch.float32)
    if result.numel():
        with torch_threads():
            _dots(_table(values), _array(slots), _array(grad_output.float()), result.numpy())
    return result


def row_sums(
    slots: Tensor,
    weights: Tensor,
    tokens: Tensor | int,
    grad_output: Tensor,
    num_slots: int,
    buffer: Tensor | None = None,
) -> RowSums:
    """See :meth:`memlm.kernels.interface.Backend.row_sums`."""
    if grad_output.dtype == torch.float64 or num_slots >= _MOST_SLOTS:
        return reference.row_sums(slots, weights, tokens, grad_output, num_slots, buffer)
    nothing = np.empty((0, grad_output.shape[1]), np.float32)
    return _grouped(slots, weights, tokens, grad_output, num_slots, buffer, nothing, np.empty(0, np.float32))


def read_backward(
    values: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor, buffer: Tensor | None = None
) -> tuple[Tensor, RowSums]:
    """See :meth:`memlm.kernels.interface.Backend.read_backward`."""
    if values.dtype == torch.float64 or values.shape[0] >= _MOST_SLOTS:
        return reference.read_backward(values, slots, weights, grad_output, buffer)
    grad_weights = torch.empty(slots.shape, dtype=torch.float32)
    sums = _grouped(
        slots.flatten(),
        weights.flatten(),
        max(1, slots.shape[1]),
        grad_output,
        values.shape[0],
        buffer,
        _table(values),
        grad_weights.view(-1).numpy(),
    )
    return grad_weights, sums


def _grouped(
    slots: Tensor,
    weights: Tensor,
    tokens: Tensor | int,
    grad_output: Tensor,
    num_slots: int,
    buffer: Tensor | None,
    table: np.ndarray,
    grad_weights: np.ndarray,
) -> RowSums:
    """Row sums, and the read weights' gradient if ``grad_weights`` is not empty."""
    dim = grad_output.shape[1]
    reads = slots.shape[0]
    with torch_threads():
        keys = np.empty(reads, np.int64)
        _pack(_array(slots), keys)
        keys.sort()  # the numbers of the reads in the lower half make the order unique, hence stable
        rows = np.empty(min(reads, num_slots), np.int32)
        starts = np.empty(rows.shape[0] + 1, np.int64)
        found = _boundaries(keys, num_slots, rows, starts) if reads else 0
        sums = _storage(buffer, found * dim).view(found, dim)
        squares = torch.empty(found, dtype=torch.float32)
        if found:
            _sum_rows(
                keys,
                starts[: found + 1],
                rows,
                _array(weights.float()),
                np.empty(0, np.int32) if isinstance(tokens, int) else _array(tokens),
                tokens if isinstance(tokens, int) else 0,
                _array(grad_output.float()),
                table,
                grad_weights,
                sums.numpy(),
                squares.numpy(),
            )
    return RowSums(torch.from_numpy(rows[:found]), sums, squares)


def _storage(buffer: Tensor | None, elements: int) -> Tensor:
    # The type is named everywhere here: torch's default is bf16 where a Trainer trains in bf16-true.
    if buffer is None or buffer.numel() < elements:
        return torch.empty(elements, dtype=torch.float32)
    return buffer[:elements]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _table(values: Tensor) -> np.ndarray:
    values = values.detach()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).contiguous().numpy()


@njit(cache=True)
def _pack(slots, keys):
    for m in range(keys.shape[0]):
        keys[m] = (np.int64(slots[m]) << 32) | m


@njit(cache=True)
def _boundaries(keys, num_slots, rows, starts):
    """Distinct slots below ``num_slots`` into ``rows``, where their reads start into ``starts``."""
    found = 0
    previous = np.int64(-1)
    for m in range(keys.shape[0]):
        slot = keys[m] >> 32
        if slot != previous:
            starts[found] = m
            if slot >= num_slots:
                return found
            rows[found] = slot
            previous = slot
            found += 1
    starts[found] = keys.shape[0]
    return found


@njit(parallel=True, cache=True, fastmath=_FAST)
def _sum_rows(keys, starts, rows, weights, tokens, per_token, grads, table, grad_weights, sums, squares):
    reads, dim = starts[-1], sums.shape[1]
    tasks = (reads + _TASK_READS - 1) // _TASK_READS
    carried = np.empty((tasks, dim), np.float32)
    carried_to = np.full(tasks, -1, np.int64)
    with_weights = grad_weights.shape[0] > 0
    for task in prange(tasks):
        begin, end = task * _TASK_READS, min(reads, (task + 1) * _TASK_READS)
        u = np.searchsorted(starts, begin, side="right") - 1
        m = begin
        if starts[u] < begin:  # the rest of a row that an earlier task began
            m = min(end, starts[u + 1])
            carried_to[task] = u
            if with_weights:
                slot = rows[u]
                _add_reads_and_dots(
                    keys,
                    begin,
                    m,
                    weights,
                    tokens,
                    per_token,
                    grads,
                    table,
                    slot,
                    grad_weights,
                    carried,
                    task,
                )
            else:
                _add_reads(keys, begin, m, weights, tokens, per_token, grads, carried, task)
            u += 1
        while m < end:
            last = min(end, starts[u + 1])
            if with_weights:
                if u + 2 < rows.shape[0] and m + 2 < end:
                    prefetch_row(table, rows[u + 2])
                _add_reads_and_dots(
                    keys, m, last, weights, tokens, per_token, grads, table, rows[u], grad_weights, sums, u
                )
            else:
                _add_reads(keys, m, last, weights, tokens, per_token, grads, sums, u)
            square = np.float32(0)
            for v in range(dim):
                square += sums[u, v] * sums[u, v]
            squares[u] = square
            m = last
            u += 1
    for task in range(tasks):
        u = carried_to[task]
        if u >= 0:
            square = np.float32(0)
            for v in range(dim):
                sums[u, v] += carried[task, v]
                square += sums[u, v] * sums[u, v]
            squares[u] = square


@njit(inline="always")
def _read_and_token(key, tokens, per_token):
    read = np.uint32(key & np.int64(0xFFFFFFFF))
    return read, (read // np.uint32(per_token) if per_token else np.uint32(tokens[read]))


@njit(fastmath=_FAST, inline="always")
def _add_reads(keys, begin, last, weights, tokens, per_token, grads, totals, to):
    """``totals[to] = sum of weight * gradient`` over the reads from ``begin`` to ``last``, four at a time."""
    m, total = begin, totals[to]
    dim = total.shape[0]
    r, n = _read_and_token(keys[m], tokens, per_token)
    w, g = weights[r], grads[n]
    for v in range(dim):
        total[v] = w * g[v]
    m += 1
    while m + 4 <= last:
        r0, n0 = _read_and_token(keys[m], tokens, per_token)
        r1, n1 = _read_and_token(keys[m + 1], tokens, per_token)
        r2, n2 = _read_and_token(keys[m + 2], tokens, per_token)
        r3, n3 = _read_and_token(keys[m + 3], tokens, per_token)
        w0, w1, w2, w3 = weights[r0], weights[r1], weights[r2], weights[r3]
        g0, g1, g2, g3 = grads[n0], grads[n1], grads[n2], grads[n3]
        for v in range(dim):
            total[v] += w0 * g0[v] + w1 * g1[v] + w2 * g2[v] + w3 * g3[v]
        m += 4
    while m < last:
        r, n = _read_and_token(keys[m], tokens, per_token)
        w, g = weights[r], grads[n]
        for v in range(dim):
            total[v] += w * g[v]
        m += 1


@njit(fastmath=_FAST, inline="always")
def _add_reads_and_dots(
    keys, begin, last, weights, tokens, per_token, grads, table, slot, grad_weights, totals, to
):
    """As ``_add_reads``, and ``grad_weights[read] = <row, gradient>``."""
    m, row, total = begin, table[slot], totals[to]
    dim = total.shape[0]
    r, n = _read_and_token(keys[m], tokens, per_token)
    w, g = weights[r], grads[n]
    dot = np.float32(0)
    for v in range(dim):
        total[v] = w * g[v]
        dot += as_float32(row[v]) * g[v]
    grad_weights[r] = dot
    m += 1
    while m + 4 <= last:
        r0, n0 = _read_and_token(keys[m], tokens, per_token)
        r1, n1 = _read_and_token(keys[m + 1], tokens, per_token)
        r2, n2 = _read_and_token(keys[m + 2], tokens, per_token)
        r3, n3 = _read_and_token(keys[m + 3], tokens, per_token)
        w0, w1, w2, w3 = weights[r0], weights[r1], weights[r2], weights[r3]
        g0, g1, g2, g3 = grads[n0], grads[n1], grads[n2], grads[n3]
        d0 = d1 = d2 = d3 = np.float32(0)
        for v in range(dim):
            x = as_float32(row[v])
            total[v] += w0 * g0[v] + w1 * g1[v] + w2 * g2[v] + w3 * g3[v]
            d0 += x * g0[v]
            d1 += x * g1[v]
            d2 += x * g2[v]
            d3 += x * g3[v]
        grad_weights[r0], grad_weights[r1], grad_weights[r2], grad_weights[r3] = d0, d1, d2, d3
        m += 4
    while m < last:
        r, n = _read_and_token(keys[m], tokens, per_token)
        w, g = weights[r], grads[n]
        dot = np.float32(0)
        for v in range(dim):
            total[v] += w * g[v]
            dot += as_float32(row[v]) * g[v]
        grad_weights[r] = dot
        m += 1


@njit(parallel=True, cache=True, fastmath=_FAST)
def _read(table, slots, weights, result):
    tokens, reads = slots.shape
    dim = table.shape[1]
    for n in prange(tokens):
        total = result[n]
        for v in range(dim):
            total[v] = 0
        quads = reads - reads % 4
        for i in range(0, quads, 4):
            if i + 8 <= reads:
                for coming in range(i + 4, i + 8):
                    prefetch_row(table, slots[n, coming])
            w0, w1, w2, w3 = weights[n, i], weights[n, i + 1], weights[n, i + 2], weights[n, i + 3]
            x0, x1 = table[slots[n, i]], table[slots[n, i + 1]]
            x2, x3 = table[slots[n, i + 2]], table[slots[n, i + 3]]
            for v in range(dim):
                total[v] += (
                    w0 * as_float32(x0[v])
                    + w1 * as_float32(x1[v])
                    + w2 * as_float32(x2[v])
                    + w3 * as_float32(x3[v])
                )
        for i in range(quads, reads):
            w, x = weights[n, i], table[slots[n, i]]
            for v in range(dim):
                total[v] += w * as_float32(x[v])


@njit(parallel=True, cache=True, fastmath=_FAST)
def _dots(table, slots, grads, result):
    tokens, reads = slots.shape
    dim = table.shape[1]
    for n in prange(tokens):
        g = grads[n]
        quads = reads - reads % 4
        for i in range(0, quads, 4):
            if i + 8 <= reads:
                for coming in range(i + 4, i + 8):
                    prefetch_row(table, slots[n, coming])
            x0, x1 = table[slots[n, i]], table[slots[n, i + 1]]
            x2, x3 = table[slots[n, i + 2]], table[slots[n, i + 3]]
            d0 = d1 = d2 = d3 = np.float32(0)
            for v in range(dim):
                d0 += as_float32(x0[v]) * g[v]
                d1 += as_float32(x1[v]) * g[v]
                d2 += as_float32(x2[v]) * g[v]
                d3 += as_float32(x3[v]) * g[v]
            result[n, i], result[n, i + 1], result[n, i + 2], result[n, i + 3] = d0, d1, d2, d3
        for i in range(quads, reads):
            x = table[slots[n, i]]
            dot = np.float32(0)
            for v in range(dim):
                dot += as_float32(x[v]) * g[v]
            result[n, i] = dot
