"""The weighted read and the gradient of its weights, in Triton.

``V`` and the tile are known to the compiler; the numbers of tokens, of reads and of slots are not, so that no
batch compiles anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.kernels.triton_tiles import check_table, narrowed, tile


def weighted_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See :meth:`memlm.kernels.interface.Backend.weighted_read`."""
    check_table(values)
    tokens, reads = slots.shape
    dim = values.shape[1]
    result = values.new_empty(tokens, dim)
    if tokens:
        rows, columns, warps = tile(dim)
        with torch.cuda.device_of(values):
            _weighted_read[(tokens, triton.cdiv(dim, columns))](
                result,
                values,
                slots.contiguous(),
                weights.contiguous(),
                reads,
                V=dim,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=warps,
            )
    return result


def read_weight_gradient(values: Tensor, slots: Tensor, grad_output: Tensor) -> Tensor:
    """See :meth:`memlm.kernels.interface.Backend.read_weight_gradient`."""
    check_table(values)
    tokens, reads = slots.shape
    dim = values.shape[1]
    result = values.new_empty(tokens, reads, dtype=torch.float32)
    if tokens:
        rows, columns, warps = tile(dim)
        with torch.cuda.device_of(values):
            _read_weight_gradient[(tokens,)](
                result,
                values,
                slots.contiguous(),
                grad_output.contiguous(),
                reads,
                V=dim,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=warps,
            )
    return result


@triton.jit(do_not_specialize=["L"])
def _weighted_read(
    result, values, slots, weights, L, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < V
    # Two-dimensional, to be summed over its rows only once: they may lie in different threads.
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, L, ROWS):
        read = start + tl.arange(0, ROWS)
        real = read < L
        slot = tl.load(slots + token * L + read, real, 0).to(tl.int64)
        weight = tl.load(weights + token * L + read, real, 0.0).to(tl.float32)
        rows = tl.load(values + slot[:, None] * V + column[None, :], real[:, None] & inside[None, :], 0.0)
        total += weight[:, None] * rows.to(tl.float32)
    tl.store(result + token * V + column, narrowed(tl.sum(total, axis=0), result.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["L"])
def _read_weight_gradient(
    result, values, slots, grad_output, L, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, L, ROWS):
        read = start + tl.arange(0, ROWS)
        real = read < L
        slot = tl.load(slots + token * L + read, real, 0).to(tl.int64)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for left in range(0, V, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            inside = column < V
            grad = tl.load(grad_output + token * V + column, inside, 0.0).to(tl.float32)
            rows = tl.load(values + slot[:, None] * V + column[None, :], real[:, None] & inside[None, :], 0.0)
            total += grad[None, :] * rows.to(tl.float32)
        tl.store(result + token * L + read, tl.sum(total, axis=1), real)
