"""Reads of a table of int8 or fp8 rows, each with a scale, on the CPU, compiled by numba.

A row goes from the table through registers into the sum: nothing is dequantised into memory.
"""

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from torch import Tensor

from memlm.kernels.numba_bf16 import float_from_bits
from memlm.kernels.numba_prefetch import prefetch_row
from memlm.kernels.numba_threads import torch_threads

# Reordering of sums is fixed when a kernel is compiled; it depends on the value dim only.
_FAST = {"reassoc", "nsz", "contract", "arcp"}
# The exponent of float8_e4m3fn has a bias of 7, that of fp32 one of 127.
_REBIAS = np.float32(2.0**120)


def weighted_read(values: Tensor, scales: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """``out[n] = sum_l weights[n, l] * scales[slots[n, l]] * values[slots[n, l]]``.

    Args:
        values: ``[S, V]`` int8 or float8_e4m3fn without NaN.
        scales: ``[S]`` fp32.
        slots: ``[N, L]`` int32 or int64, each in ``[0, S)``.
        weights: ``[N, L]`` floating point.

    Returns:
        ``[N, V]`` fp32.
    """
    result = torch.empty(slots.shape[0], values.shape[1], dtype=torch.float32)
    if result.numel():
        with torch_threads():
            _read(_bits(values), scales.numpy(), _array(slots), _array(weights.float()), result.numpy())
    return result


def dots(values: Tensor, scales: Tensor, slots: Tensor, hidden: Tensor) -> Tensor:
    """``out[n, l] = scales[slots[n, l]] * <values[slots[n, l]], hidden[n]>``.

    Args:
        values: ``[S, V]`` int8 or float8_e4m3fn without NaN.
        scales: ``[S]`` fp32.
        slots: ``[N, L]`` int32 or int64, each in ``[0, S)``.
        hidden: ``[N, V]`` floating point.

    Returns:
        ``[N, L]`` fp32.
    """
    result = torch.empty(slots.shape, dtype=torch.float32)
    if result.numel():
        with torch_threads():
            _dots(_bits(values), scales.numpy(), _array(slots), _array(hidden.float()), result.numpy())
    return result


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _bits(values: Tensor) -> np.ndarray:
    """int8 stays; of fp8, which numpy does not know, the bits."""
    return (values if values.dtype == torch.int8 else values.view(torch.uint8)).numpy()


def _number(element):
    """In numba kernels: an int8, or the bits of a float8_e4m3fn, as fp32."""
    raise NotImplementedError("only inside numba kernels")


@overload(_number, inline="always")
def _as_number(element):
    if element == types.int8:
        return lambda element: np.float32(element)
    if element == types.uint8:

        def of_fp8(element):
            # Exponent and mantissa side by side, as fp32 has them; below 2^-6 too, where both are subnormal.
            bits = np.uint32(element)
            sign = (bits & np.uint32(0x80)) << np.uint32(24)
            return float_from_bits(sign | ((bits & np.uint32(0x7F)) << np.uint32(20))) * _REBIAS  # type: ignore[call-arg]

        return of_fp8
    return None


@njit(parallel=True, cache=True, fastmath=_FAST)
def _read(table, scales, slots, weights, result):
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
            s0, s1, s2, s3 = slots[n, i], slots[n, i + 1], slots[n, i + 2], slots[n, i + 3]
            w0, w1 = weights[n, i] * scales[s0], weights[n, i + 1] * scales[s1]
            w2, w3 = weights[n, i + 2] * scales[s2], weights[n, i + 3] * scales[s3]
            x0, x1, x2, x3 = table[s0], table[s1], table[s2], table[s3]
            for v in range(dim):
                total[v] += (
                    w0 * _number(x0[v]) + w1 * _number(x1[v]) + w2 * _number(x2[v]) + w3 * _number(x3[v])
                )
        for i in range(quads, reads):
            s = slots[n, i]
            w, x = weights[n, i] * scales[s], table[s]
            for v in range(dim):
                total[v] += w * _number(x[v])


@njit(parallel=True, cache=True, fastmath=_FAST)
def _dots(table, scales, slots, hidden, result):
    tokens, reads = slots.shape
    dim = table.shape[1]
    for n in prange(tokens):
        h = hidden[n]
        quads = reads - reads % 4
        for i in range(0, quads, 4):
            if i + 8 <= reads:
                for coming in range(i + 4, i + 8):
                    prefetch_row(table, slots[n, coming])
            s0, s1, s2, s3 = slots[n, i], slots[n, i + 1], slots[n, i + 2], slots[n, i + 3]
            x0, x1, x2, x3 = table[s0], table[s1], table[s2], table[s3]
            d0 = d1 = d2 = d3 = np.float32(0)
            for v in range(dim):
                d0 += _number(x0[v]) * h[v]
                d1 += _number(x1[v]) * h[v]
                d2 += _number(x2[v]) * h[v]
                d3 += _number(x3[v]) * h[v]
            result[n, i], result[n, i + 1] = d0 * scales[s0], d1 * scales[s1]
            result[n, i + 2], result[n, i + 3] = d2 * scales[s2], d3 * scales[s3]
        for i in range(quads, reads):
            s = slots[n, i]
            x = table[s]
            d = np.float32(0)
            for v in range(dim):
                d += _number(x[v]) * h[v]
            result[n, i] = d * scales[s]
