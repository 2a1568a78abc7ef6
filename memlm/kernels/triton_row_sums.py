"""Gradients of the rows read, in Triton: sort the reads by slot, sum each run of equal slots.

A run is summed in segments of fixed length, each by a program of its own, so that a row that many tokens read
takes no longer than the others. The first segment's sum goes straight to the row's place; those of the
further segments, the *extras*, go to a place of their own and are added up by a tree. Lengths and order
depend on the reads alone: so does every bit.

Nothing here waits for the device. Buffers are as large as the reads might need; how much of them counts is
known to the device only, and a program beyond it ends at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.kernels.interface import RowSums, slot_dtype
from memlm.kernels.triton_tiles import check_table, tile

# Reads of one segment: long enough that the extras take little memory (less than a 128th of the gathered
# rows), short enough that a segment takes tens of microseconds.
_SEGMENT = 128
# Partial sums that one program of the tree adds.
_FAN_IN = 128
# Reads of one program that only moves indices.
_READS = 1024


class _Runs(NamedTuple):
    """The reads in the order of their slots, and where the runs of equal slots lie."""

    rows: Tensor
    """``[U]`` the slot of each run."""
    starts: Tensor
    """``[U + 1]`` its first read."""
    found: Tensor
    """Scalar int64: how many of the ``U`` there are."""
    order: Tensor
    """``[M]`` int64: where each sorted read stood before."""
    weights: Tensor
    """``[M]`` fp32, sorted."""
    tokens: Tensor
    """``[M]``, sorted."""


class _Extras(NamedTuple):
    """Segments beyond the first of each run, in the order of the runs."""

    ends: Tensor
    """``[U]``: how many extras belong to this run and those before it."""
    owners: Tensor
    """``[E]``: the run of each extra; ``U`` beyond the last."""


def row_sums(
    slots: Tensor,
    weights: Tensor,
    tokens: Tensor | int,
    grad_output: Tensor,
    num_slots: int,
    buffer: Tensor | None = None,
) -> RowSums:
    """See :meth:`memlm.kernels.interface.Backend.row_sums`."""
    return _sum_rows(slots, weights, tokens, grad_output, num_slots, buffer, None, None)


def read_backward(
    values: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor, buffer: Tensor | None = None
) -> tuple[Tensor, RowSums]:
    """See :meth:`memlm.kernels.interface.Backend.read_backward`."""
    check_table(values)
    grad_weights = values.new_empty(slots.shape, dtype=torch.float32)
    reads = max(1, slots.shape[1])
    gradient = _sum_rows(
        slots.flatten(), weights.flatten(), reads, grad_output, values.shape[0], buffer, values, grad_weights
    )
    return grad_weights, gradient


def _sum_rows(
    slots: Tensor,
    weights: Tensor,
    tokens: Tensor | int,
    grad_output: Tensor,
    num_slots: int,
    buffer: Tensor | None,
    values: Tensor | None,
    grad_weights: Tensor | None,
) -> RowSums:
    """Row sums, and, where ``values`` are given, their products with the gradient into ``grad_weights``."""
    grad_output = grad_output.contiguous()
    check_table(grad_output)
    dim = grad_output.shape[1]
    reads = slots.shape[0]
    capacity = min(reads, num_slots)
    if capacity == 0:
        rows = slots.new_empty(0, dtype=slot_dtype(num_slots))
        return RowSums(rows, grad_output.new_empty(0, dim, dtype=torch.float32), rows.new_empty(0).float())
    with torch.cuda.device_of(grad_output):
        runs = _find_runs(slots, weights, tokens, num_slots, grad_output.shape[0])
        extras = _find_extras(runs, reads // _SEGMENT)
        if buffer is not None and buffer.numel() >= capacity * dim:
            sums = buffer[: capacity * dim].view(capacity, dim)
        else:
            sums = grad_output.new_empty(capacity, dim, dtype=torch.float32)
        squares = grad_output.new_zeros(capacity, dtype=torch.float32)
        _sum_runs(sums, squares, runs, extras, grad_output, values, grad_weights)
    return RowSums(runs.rows, sums, squares, runs.found)


def _find_runs(
    slots: Tensor, weights: Tensor, tokens: Tensor | int, num_slots: int, num_tokens: int
) -> _Runs:
    reads = slots.shape[0]
    capacity = min(reads, num_slots)
    index_dtype = slot_dtype(max(reads, num_tokens))
    ordered, order = torch.sort(slots.to(slot_dtype(num_slots)), stable=True)
    first = ordered < num_slots
    first[1:] &= ordered[1:] != ordered[:-1]
    numbers = first.cumsum(0, dtype=index_dtype)
    runs = _Runs(
        rows=torch.empty(capacity, dtype=ordered.dtype, device=slots.device),
        starts=torch.empty(capacity + 1, dtype=index_dtype, device=slots.device),
        found=numbers[-1].to(torch.int64),
        order=order,
        weights=torch.empty(reads, dtype=torch.float32, device=slots.device),
        tokens=torch.empty(reads, dtype=index_dtype, device=slots.device),
    )
    _place_reads[(triton.cdiv(reads, _READS),)](
        runs.rows,
        runs.starts,
        runs.weights,
        runs.tokens,
        ordered,
        order,
        numbers,
        weights.contiguous(),
        None if isinstance(tokens, int) else tokens.contiguous(),
        tokens if isinstance(tokens, int) else 0,
        reads,
        num_slots,
        READS=_READS,
    )
    return runs


def _find_extras(runs: _Runs, capacity: int) -> _Extras:
    """The extras of all runs: of ``M`` reads at most ``M // _SEGMENT``, the capacity."""
    starts = runs.starts
    if capacity == 0:
        return _Extras(starts, starts[:0])
    number = torch.arange(runs.rows.shape[0], device=starts.device)
    further = (starts[1:] - starts[:-1] - 1) // _SEGMENT
    ends = torch.where(number < runs.found, further, 0).cumsum(0, dtype=starts.dtype)
    extra = torch.arange(capacity, dtype=starts.dtype, device=starts.device)
    return _Extras(ends, torch.searchsorted(ends, extra, right=True, out_int32=starts.dtype == torch.int32))


def _sum_runs(
    sums: Tensor,
    squares: Tensor,
    runs: _Runs,
    extras: _Extras,
    grad_output: Tensor,
    values: Tensor | None,
    grad_weights: Tensor | None,
) -> None:
    """Fill ``sums`` and ``squares``, and ``grad_weights`` where ``values`` are given."""
    capacity, dim = sums.shape
    further = extras.owners.shape[0]
    partial = sums.new_empty(further, dim)
    rows, columns, warps = tile(dim)
    _sum_segments[(further + capacity,)](
        sums,
        partial,
        squares,
        runs.rows,
        runs.starts,
        runs.found,
        extras.ends,
        extras.owners,
        runs.weights,
        runs.tokens,
        grad_output,
        values,
        grad_weights,
        runs.order,
        further,
        V=dim,
        SEGMENT=_SEGMENT,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
    )
    stride = 1
    while stride <= further:
        last = stride * _FAN_IN >= further
        _add_extras[(further,)](
            sums,
            partial,
            squares,
            runs.starts,
            runs.found,
            extras.ends,
            extras.owners,
            stride,
            int(last),
            V=dim,
            SEGMENT=_SEGMENT,
            FAN_IN=_FAN_IN,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
        )
        if last:
            return
        stride *= _FAN_IN


@triton.jit(do_not_specialize=["L", "M", "S"])
def _place_reads(
    rows,
    starts,
    sorted_weights,
    sorted_tokens,
    ordered,
    order,
    numbers,
    weights,
    tokens,
    L,
    M,
    S,
    READS: tl.constexpr,
):
    """Weights and tokens in sorted order; slot and bounds of each run."""
    read = tl.program_id(0).to(tl.int64) * READS + tl.arange(0, READS)
    real = read < M
    source = tl.load(order + read, real, 0)
    tl.store(sorted_weights + read, tl.load(weights + source, real, 0.0).to(tl.float32), real)
    if tokens is None:
        token = source // L
    else:
        token = tl.load(tokens + source, real, 0)
    tl.store(sorted_tokens + read, token.to(sorted_tokens.dtype.element_ty), real)

    slot = tl.load(ordered + read, real, 0)
    before = tl.load(ordered + read - 1, real & (read > 0), -1)
    after = tl.load(ordered + read + 1, read + 1 < M, 0)
    kept = real & (slot < S)
    first = kept & (slot != before)
    last = kept & ((read + 1 == M) | (after >= S))  # of all that are kept
    run = tl.load(numbers + read, real, 1).to(tl.int64) - 1
    tl.store(rows + run, slot, first)
    tl.store(starts + run, read.to(starts.dtype.element_ty), first)
    tl.store(starts + run + 1, (read + 1).to(starts.dtype.element_ty), last)


@triton.jit(do_not_specialize=["further"])
def _sum_segments(
    sums,
    partial,
    squares,
    rows,
    starts,
    count,
    extra_ends,
    owners,
    weights,
    tokens,
    grad_output,
    values,
    grad_weights,
    order,
    further,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The extras go first: they are full, the segments that follow are mostly short.
    program = tl.program_id(0).to(tl.int64)
    is_extra = program < further
    run = program - further
    if is_extra:
        run = tl.load(owners + program).to(tl.int64)
    if run >= tl.load(count):
        return
    begin = tl.load(starts + run).to(tl.int64)
    end = tl.load(starts + run + 1).to(tl.int64)
    extras = (end - begin - 1) // SEGMENT
    if is_extra:
        begin += (program - tl.load(extra_ends + run).to(tl.int64) + extras + 1) * SEGMENT
    end = tl.minimum(end, begin + SEGMENT)
    if values is not None:
        slot = tl.load(rows + run).to(tl.int64)
    square = tl.zeros([COLUMNS], tl.float32)
    for left in range(0, V, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        inside = column < V
        if values is not None:
            row = tl.load(values + slot * V + column, inside, 0.0).to(tl.float32)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(begin, end, ROWS):
            read = start + tl.arange(0, ROWS)
            real = read < end
            weight = tl.load(weights + read, real, 0.0)
            token = tl.load(tokens + read, real, 0).to(tl.int64)
            grad = tl.load(
                grad_output + token[:, None] * V + column[None, :], real[:, None] & inside[None, :], 0.0
            ).to(tl.float32)
            total += weight[:, None] * grad
            if values is not None:
                product = tl.sum(grad * row[None, :], axis=1)
                place = grad_weights + tl.load(order + read, real, 0)
                if V > COLUMNS:
                    product += tl.load(place, real & (left > 0), 0.0)
                tl.store(place, product, real)
        result = tl.sum(total, axis=0)
        tl.store(sums + run * V + column, result, inside & (program >= further))
        tl.store(partial + program * V + column, result, inside & is_extra)
        square += result * result
        if V > COLUMNS and values is not None:
            # The next columns add to products that other threads of this program may have stored.
            tl.debug_barrier()
    if extras == 0:
        tl.store(squares + run, tl.sum(square, axis=0))


@triton.jit(do_not_specialize=["stride", "last"])
def _add_extras(
    sums,
    partial,
    squares,
    starts,
    count,
    extra_ends,
    owners,
    stride,
    last,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
    FAN_IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One level of the tree: of each ``FAN_IN * stride`` extras of a run add each ``stride``-th to the first.

    The last level has one working program a run, which adds to the row itself.
    """
    program = tl.program_id(0).to(tl.int64)
    run = tl.load(owners + program).to(tl.int64)
    if run >= tl.load(count):
        return
    extras = (tl.load(starts + run + 1) - tl.load(starts + run) - 1).to(tl.int64) // SEGMENT
    place = program - tl.load(extra_ends + run).to(tl.int64) + extras
    if place % (stride.to(tl.int64) * FAN_IN) != 0:
        return
    terms = tl.minimum(FAN_IN, (extras - place + stride - 1) // stride)
    square = tl.zeros([COLUMNS], tl.float32)
    for left in range(0, V, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        inside = column < V
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, terms, ROWS):
            term = start + tl.arange(0, ROWS)
            source = program + term.to(tl.int64) * stride
            real = term < terms
            total += tl.load(
                partial + source[:, None] * V + column[None, :], real[:, None] & inside[None, :], 0.0
            )
        result = tl.sum(total, axis=0)
        result += tl.load(sums + run * V + column, inside & (last != 0), 0.0)
        # No thread may load what another has stored already.
        tl.debug_barrier()
        tl.store(sums + run * V + column, result, inside & (last != 0))
        tl.store(partial + program * V + column, result, inside & (last == 0))
        square += result * result
    if last != 0:
        tl.store(squares + run, tl.sum(square, axis=0))
