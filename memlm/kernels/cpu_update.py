"""The row optimizer on the CPU, compiled by numba: one pass over the rows that move, at the memory's speed.

The arithmetic of a row depends on that row alone, in a fixed order, so the bits of the result depend neither
on the number of threads nor on how rows are shared out among them.
"""

import math

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from memlm.kernels import update as reference
from memlm.kernels.interface import RowState, RowSums, RowUpdate
from memlm.kernels.numba_prefetch import prefetch_row
from memlm.kernels.numba_threads import torch_threads

# Rows that a thread takes at a time.
_CHUNK = 64
# How many rows ahead are fetched. One takes about as long as a memory access.
_AHEAD = 2
# Chunks that span fewer rows than this times their own also fetch the few rows between them: every gap stops
# the hardware's own prefetch, which costs more than what it would have read in vain. Without it the update of
# 90 % of the rows takes longer than that of all. Chunks without gaps are best left to the hardware.
_DENSE = 1.75
_MOST_FILLED = 8
# Fused multiply-add only: reordered sums would be no faster here, and NaN must stay NaN.
_FAST = {"contract"}


def update_rows(
    values: Tensor, state: RowState, gradient: RowSums, factor: Tensor | None, update: RowUpdate
) -> None:
    """See :meth:`memlm.kernels.interface.Backend.update_rows`."""
    if values.dtype not in (torch.float32, torch.bfloat16) or not values.is_contiguous():
        reference.update_rows(values, state, gradient, factor, update)
        return
    count = gradient.rows.shape[0] if gradient.count is None else int(gradient.count)
    if update.method == "sgd":
        state = RowState(decayed_at=state.decayed_at, master=state.master)
        correction1 = correction2 = 1.0
    else:
        correction1, correction2 = (1 - beta**update.step for beta in update.betas)
    scalars = (
        1.0 if factor is None else float(factor),
        update.lr / correction1,
        1 / math.sqrt(correction2),
        update.eps,
        1 - update.betas[0],
        1 - update.betas[1],
    )
    rowwise = update.method == "adamw_rowwise"
    halves = values.detach().view(torch.uint16) if values.dtype == torch.bfloat16 else None
    table = values.detach() if halves is None else state.master
    key = reference.rounding_key(update.seed, update.step) if table is None else 0
    with torch_threads():
        _update(
            _array(table, 2, np.float32),
            _array(halves, 2, np.uint16),
            _array(state.exp_avg, 2, np.float32),
            _array(None if rowwise else state.exp_avg_sq, 2, np.float32),
            _array(state.exp_avg_sq if rowwise else None, 1, np.float32),
            _array(state.last_step, 1, np.int32),
            _array(state.decayed_at, 1, np.float64),
            gradient.rows[:count].numpy(),
            gradient.sums.contiguous().numpy(),
            gradient.squares.numpy(),
            tuple(np.float32(scalar) for scalar in scalars),
            (float(update.betas[0]), float(update.betas[1])),
            float(update.decay_log),
            update.step,
            np.uint32(key),
            (update.first_row, update.first_column),
        )
    # Autograd must notice when a table is changed between a forward pass and its backward pass.
    torch.autograd.graph.increment_version(values)


def _array(tensor: Tensor | None, dimensions: int, dtype: type) -> np.ndarray:
    """Empty for what the options do not need: the kernel is compiled once for all of them."""
    return np.empty((0,) * dimensions, dtype) if tensor is None else tensor.numpy()


@njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
def _update(
    table,
    halves,
    exp_avg,
    exp_avg_sq,
    row_avg_sq,
    last_step,
    decayed_at,
    rows,
    sums,
    squares,
    scalars,
    betas,
    decay_log,
    step,
    key,
    place,
):
    """``table``: fp32 values or masters. ``halves``: the bits of bf16 values. ``place``: of both in a larger
    table."""
    columns = sums.shape[1]
    factor, rate, correction, eps, new1, new2 = scalars
    for chunk in prange((rows.shape[0] + _CHUNK - 1) // _CHUNK):
        scratch = np.empty(columns if table.shape[0] == 0 else 0, np.float32)
        # Powers are worked out only where they differ from the row before: most rows slept equally long.
        since, owed = decay_log, np.float32(1.0)
        slept, keep1, keep2 = np.int64(1), np.float32(betas[0]), np.float32(betas[1])
        start, end = chunk * _CHUNK, min(rows.shape[0], (chunk + 1) * _CHUNK)
        span = np.int64(rows[end - 1]) - np.int64(rows[start])
        fetch, fill = span >= end - start, span < _DENSE * (end - start)
        for u in range(start, end):
            row = np.int64(rows[u])
            if fetch and u + _AHEAD < rows.shape[0]:
                coming = np.int64(rows[u + _AHEAD])
                first = max(np.int64(rows[u + _AHEAD - 1]) + 1, coming - _MOST_FILLED) if fill else coming
                for r in range(first, coming + 1):
                    prefetch_row(table, r)
                    prefetch_row(halves, r)
                    prefetch_row(exp_avg, r)
                    prefetch_row(exp_avg_sq, r)
            if decayed_at.shape[0] > 0:
                if decayed_at[row] != since:
                    since = decayed_at[row]
                    owed = np.float32(math.exp(decay_log - since))
                decayed_at[row] = decay_log
            if last_step.shape[0] > 0:
                if step - last_step[row] != slept:
                    slept = step - last_step[row]
                    keep1, keep2 = np.float32(betas[0] ** slept), np.float32(betas[1] ** slept)
                last_step[row] = step
            p = scratch
            if table.shape[0] > 0:
                p = table[row]
            else:
                _widen(halves[row], p)
            g = sums[u]
            if exp_avg_sq.shape[0] > 0:
                if exp_avg.shape[0] > 0:
                    _adamw(p, g, exp_avg[row], exp_avg_sq[row], owed, keep1, keep2, scalars)
                else:
                    _adamw_without_momentum(p, g, exp_avg_sq[row], owed, keep2, scalars)
            elif row_avg_sq.shape[0] > 0:
                square = squares[u] * factor * factor / np.float32(columns)
                square = row_avg_sq[row] * keep2 + new2 * square
                row_avg_sq[row] = square
                scale = rate / (math.sqrt(square) * correction + eps)
                if exp_avg.shape[0] > 0:
                    _momentum(p, g, exp_avg[row], owed, keep1, new1, factor, scale)
                else:
                    _subtract(p, g, owed, scale * factor)
            else:
                _subtract(p, g, owed, rate * factor)
            if halves.shape[0] > 0:
                if table.shape[0] > 0:
                    _round_to_nearest(p, halves[row])
                else:
                    _round_stochastically(p, halves[row], _row_key(row + place[0], key), place[1])


@njit(fastmath=_FAST, error_model="numpy")
def _adamw(p, g, m, v, owed, keep1, keep2, scalars):
    factor, rate, correction, eps, new1, new2 = scalars
    for i in range(p.shape[0]):
        x = g[i] * factor
        mean = m[i] * keep1 + new1 * x
        square = v[i] * keep2 + new2 * (x * x)
        m[i] = mean
        v[i] = square
        p[i] = p[i] * owed - rate * mean / (math.sqrt(square) * correction + eps)


@njit(fastmath=_FAST, error_model="numpy")
def _adamw_without_momentum(p, g, v, owed, keep2, scalars):
    factor, rate, correction, eps, _, new2 = scalars
    for i in range(p.shape[0]):
        x = g[i] * factor
        square = v[i] * keep2 + new2 * (x * x)
        v[i] = square
        p[i] = p[i] * owed - rate * x / (math.sqrt(square) * correction + eps)


@njit(fastmath=_FAST, error_model="numpy")
def _momentum(p, g, m, owed, keep1, new1, factor, scale):
    for i in range(p.shape[0]):
        mean = m[i] * keep1 + new1 * (g[i] * factor)
        m[i] = mean
        p[i] = p[i] * owed - scale * mean


@njit(fastmath=_FAST, error_model="numpy")
def _subtract(p, g, owed, scale):
    for i in range(p.shape[0]):
        p[i] = p[i] * owed - scale * g[i]


@njit
def _widen(halves, p):
    bits = p.view(np.uint32)
    for i in range(p.shape[0]):
        bits[i] = np.uint32(halves[i]) << np.uint32(16)


@njit
def _mix(bits):
    """MurmurHash3's 32-bit finaliser."""
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@njit
def _row_key(row, key):
    return _mix(_mix(np.uint32(row) ^ key) ^ np.uint32(row >> 32))


@njit
def _round_stochastically(p, halves, row_key, first_column):
    """See :func:`memlm.kernels.update.rounding_bits`."""
    bits = p.view(np.uint32)
    for i in range(p.shape[0]):
        exact = bits[i]
        random = _mix(row_key ^ np.uint32(first_column + i)) & np.uint32(0xFFFF)
        if (exact & np.uint32(0x7F800000)) == np.uint32(0x7F800000):
            random = np.uint32(0)  # infinity and NaN stay what they are
        halves[i] = np.uint16(np.uint32(exact + random) >> np.uint32(16))


@njit
def _round_to_nearest(p, halves):
    bits = p.view(np.uint32)
    for i in range(p.shape[0]):
        exact = bits[i]
        up = np.uint32(0x7FFF) + ((exact >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(exact + up) >> np.uint32(16)
        if (exact & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            rounded = np.uint32(0x7FC0)  # the carry would make an infinity or a zero of a NaN
        halves[i] = np.uint16(rounded)
