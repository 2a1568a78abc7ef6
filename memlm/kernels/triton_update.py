"""The row optimizer in Triton: one program moves one row."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.kernels.interface import RowState, RowSums, RowUpdate
from memlm.kernels.triton_tiles import check_table, narrowed, tile
from memlm.kernels.update import rounding_key


def update_rows(
    values: Tensor, state: RowState, gradient: RowSums, factor: Tensor | None, update: RowUpdate
) -> None:
    """See :meth:`memlm.kernels.interface.Backend.update_rows`. Raises TypeError for fp64 values."""
    check_table(values)
    for name, tensor in state._asdict().items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"the state {name} must be contiguous; its strides are {tensor.stride()}")
    capacity = gradient.rows.shape[0]
    if capacity == 0:
        return
    beta1, beta2 = update.betas
    adam = update.method != "sgd"
    dim = values.shape[1]
    _, columns, warps = tile(dim)
    # As a signed number: Triton would compile once more for a key above 2^31.
    key = (rounding_key(update.seed, update.step) ^ 2**31) - 2**31
    with torch.cuda.device_of(values):
        _update_rows[(capacity,)](
            values,
            state.master,
            state.exp_avg if adam else None,
            state.exp_avg_sq if adam else None,
            state.last_step if adam else None,
            state.decayed_at,
            gradient.rows.contiguous(),
            gradient.sums.contiguous(),
            gradient.squares.contiguous(),
            gradient.count,
            factor,
            float(update.lr) / (1 - beta1**update.step if adam else 1.0),
            float(beta1),
            1.0 - beta1,
            float(beta2),
            1.0 - beta2,
            math.sqrt(1 - beta2**update.step) if adam else 1.0,
            float(update.eps),
            _log(beta1),
            _log(beta2),
            float(update.decay_log),
            update.step,
            key,
            update.first_row,
            update.first_column,
            METHOD=update.method,
            V=dim,
            COLUMNS=columns,
            num_warps=warps,
        )
    # Autograd must notice when a table is changed between a forward pass and its backward pass.
    torch.autograd.graph.increment_version(values)


def _log(beta: float) -> float:
    # exp(steps * log(0)) must be 0, and 1 for 0 steps: a finite number instead of -inf.
    return math.log(beta) if beta > 0 else -1e300


@triton.jit(do_not_specialize=["step", "key", "first_row", "first_column"])
def _update_rows(
    values,
    master,
    exp_avg,
    exp_avg_sq,
    last_step,
    decayed_at,
    rows,
    sums,
    squares,
    count,
    factor,
    rate,
    beta1,
    fresh1,
    beta2,
    fresh2,
    correction2,
    eps,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    decay_log: tl.float64,
    step,
    key,
    first_row,
    first_column,
    METHOD: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    limit = place + 1
    if count is not None:
        limit = tl.load(count)
    if place >= limit:
        return
    row = tl.load(rows + place).to(tl.int64)
    scale = 1.0
    if factor is not None:
        scale = tl.load(factor).to(tl.float32)
    if decayed_at is not None:
        owed = tl.exp(decay_log - tl.load(decayed_at + row)).to(tl.float32)
    keep1 = beta1
    keep2 = beta2
    if last_step is not None:
        slept = (step - tl.load(last_step + row)).to(tl.float64)
        keep1 = tl.exp(slept * log_beta1).to(tl.float32)
        keep2 = tl.exp(slept * log_beta2).to(tl.float32)
    if METHOD == "adamw_rowwise":
        mean_square = tl.load(squares + place) * (scale * scale) / V
        row_square = tl.load(exp_avg_sq + row) * keep2 + fresh2 * mean_square
    # All threads have read the row's numbers before one of them writes them.
    tl.debug_barrier()
    if decayed_at is not None:
        tl.store(decayed_at + row, decay_log)
    if last_step is not None:
        tl.store(last_step + row, step)
    if METHOD == "adamw_rowwise":
        tl.store(exp_avg_sq + row, row_square)

    for left in range(0, V, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        inside = column < V
        element = row * V + column
        grad = tl.load(sums + place * V + column, inside, 0.0) * scale
        if master is not None:
            value = tl.load(master + element, inside, 0.0)
        else:
            value = tl.load(values + element, inside, 0.0).to(tl.float32)
        if decayed_at is not None:
            value = value * owed
        if METHOD == "sgd":
            value -= rate * grad
        else:
            mean = grad
            if exp_avg is not None:
                mean = tl.load(exp_avg + element, inside, 0.0) * keep1 + fresh1 * grad
                tl.store(exp_avg + element, mean, inside)
            if METHOD == "adamw":
                square = tl.load(exp_avg_sq + element, inside, 0.0) * keep2 + fresh2 * (grad * grad)
                tl.store(exp_avg_sq + element, square, inside)
            else:
                square = tl.zeros([COLUMNS], tl.float32) + row_square
            denominator = tl.div_rn(tl.sqrt_rn(square), correction2) + eps
            value -= tl.div_rn(rate * mean, denominator)
        if master is not None:
            tl.store(master + element, value, inside)
            tl.store(values + element, narrowed(value, values.dtype.element_ty), inside)
        elif values.dtype.element_ty == tl.bfloat16:
            random = _rounding_bits(row + first_row, column + first_column, key)
            tl.store(values + element, _rounded(value, random), inside)
        else:
            tl.store(values + element, narrowed(value, values.dtype.element_ty), inside)


@triton.jit
def _rounding_bits(row, column, key):
    """The bits of :func:`memlm.kernels.update.rounding_bits`."""
    bits = _mix(row.to(tl.uint32) ^ key.to(tl.uint32))
    bits = _mix(bits ^ (row >> 32).to(tl.uint32))
    return _mix(bits ^ column.to(tl.uint32)) & 0xFFFF


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _rounded(x, random):
    """fp32 to bf16, stochastically; infinities and NaN keep their upper bits."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, bits + random, bits) >> 16
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
