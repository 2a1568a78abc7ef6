"""The row optimizer in plain PyTorch, and the random bits of its stochastic rounding."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from memlm.kernels.interface import RowState, RowSums, RowUpdate

# Elements of one chunk of rows.
_CHUNK_ELEMENTS = 500_000
_MASK = 0xFFFFFFFF
_Bits = TypeVar("_Bits", Tensor, int)


def mix(bits: _Bits) -> _Bits:
    """MurmurHash3's 32-bit finaliser, on unsigned 32-bit numbers held in int64, or on a single one."""
    bits = bits & _MASK
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _MASK
    return bits ^ (bits >> 16)


def rounding_key(seed: int, step: int) -> int:
    """The 32-bit key of one step's random bits."""
    return mix(mix(mix(seed & _MASK) ^ (seed >> 32)) ^ step)


def rounding_bits(rows: Tensor, columns: int, seed: int, step: int, first_column: int = 0) -> Tensor:
    """Random bits in ``[0, 2^16)`` for every element of some rows.

    A hash of seed, step, row and column: the same whatever the other rows, the threads or the backend, so
    that a resumed run goes on with the bits it would have had. With ``mix`` the 32-bit finaliser of
    MurmurHash3 and rows split in two 32-bit words: ``mix(mix(mix(key ^ low) ^ high) ^ column) & 0xFFFF``.

    Returns:
        ``[U, columns]`` int64.
    """
    row = rows.to(torch.int64)
    key = rounding_key(seed, step)
    row_key = mix(mix((row & _MASK) ^ key) ^ (row >> 32))
    column = torch.arange(first_column, first_column + columns, device=rows.device)
    return mix(row_key.unsqueeze(1) ^ column) & 0xFFFF


def round_stochastically(exact: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16, up or down with probabilities that make the expectation exact.

    Args:
        exact: fp32.
        random: Same shape, int64 in ``[0, 2^16)``.
    """
    bits = exact.view(torch.int32).to(torch.int64) & _MASK
    rounded = (bits + random) & _MASK
    # The carry must not turn an infinity or a NaN into something else.
    rounded = torch.where(torch.isfinite(exact), rounded, bits) >> 16
    return rounded.to(torch.int32).to(torch.int16).view(torch.bfloat16)


def update_rows(
    values: Tensor, state: RowState, gradient: RowSums, factor: Tensor | None, update: RowUpdate
) -> None:
    """See :meth:`memlm.kernels.interface.Backend.update_rows`."""
    count = gradient.rows.shape[0] if gradient.count is None else int(gradient.count)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, values.shape[1]))
    for start in range(0, count, chunk):
        part = slice(start, min(count, start + chunk))
        rows = gradient.rows[part].long()
        sums, squares = gradient.sums[part], gradient.squares[part]
        if factor is not None:
            sums, squares = sums * factor, squares * factor.square()
        _update_chunk(values, state, rows, sums, squares, update)


def _update_chunk(
    values: Tensor, state: RowState, rows: Tensor, gradient: Tensor, squares: Tensor, update: RowUpdate
) -> None:
    table = values if state.master is None else state.master
    row = table[rows].to(gradient.dtype)
    if state.decayed_at is not None:
        owed = (update.decay_log - state.decayed_at[rows]).exp()
        row = row * owed.to(row.dtype).unsqueeze(1)
        state.decayed_at[rows] = update.decay_log
    if update.method == "sgd":
        row = row - update.lr * gradient
    else:
        beta1, beta2 = update.betas
        slept: Tensor | int = 1
        if state.last_step is not None:
            slept = (update.step - state.last_step[rows]).to(gradient.dtype).unsqueeze(1)
            state.last_step[rows] = update.step
        mean = gradient
        if state.exp_avg is not None:
            mean = state.exp_avg[rows] * beta1**slept + (1 - beta1) * gradient
            state.exp_avg[rows] = mean
        assert state.exp_avg_sq is not None
        if update.method == "adamw":
            square, new = state.exp_avg_sq[rows], gradient.square()
        else:
            square, new = state.exp_avg_sq[rows].unsqueeze(1), squares.unsqueeze(1) / values.shape[1]
        square = square * beta2**slept + (1 - beta2) * new
        state.exp_avg_sq[rows] = square if update.method == "adamw" else square.squeeze(1)
        denominator = square.sqrt() / math.sqrt(1 - beta2**update.step) + update.eps
        row = row - (update.lr / (1 - beta1**update.step)) * mean / denominator
    if state.master is not None:
        state.master[rows] = row
    if values.dtype == torch.bfloat16 and state.master is None:
        whole = rows + update.first_row
        random = rounding_bits(whole, values.shape[1], update.seed, update.step, update.first_column)
        values[rows] = round_stochastically(row, random)
    else:
        values[rows] = row.to(values.dtype)
