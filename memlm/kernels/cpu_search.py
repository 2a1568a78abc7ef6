"""The product-key search on the CPU, compiled by numba: selection by threshold, then by rank."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from memlm.kernels import reference
from memlm.kernels.interface import slot_dtype
from memlm.kernels.numba_threads import torch_threads

# Rows of one task: enough to hide a task's cost, few enough to share out.
_TASK_ROWS = 64
# Above so many survivors of the threshold ranking all pairs costs more than insertion.
_MOST_RANKED = 128


def best_slots(first: Tensor, second: Tensor, reads: int) -> tuple[Tensor, Tensor]:
    """See :meth:`memlm.kernels.interface.Backend.best_slots`."""
    if first.dtype == torch.float64:
        return reference.best_slots(first, second, reads)
    heads, tokens, columns = first.shape
    dtype = slot_dtype(columns * second.shape[-1])
    slots = torch.empty(tokens, heads, reads, dtype=dtype)
    sums = torch.empty(tokens, heads, reads, dtype=torch.float32)
    if sums.numel():
        with torch_threads():
            _search(_ordered_view(first), _ordered_view(second), slots.numpy(), sums.numpy())
    return slots, sums


def _ordered_view(scores: Tensor) -> np.ndarray:
    return scores.detach().float().contiguous().view(torch.int32).numpy()


@njit(inline="always")
def _ordered(bits):
    """Bits of a float to an integer of the same order, both zeros to 0; its own inverse but for -0."""
    if bits == np.int32(-2147483648):
        return np.int32(0)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@njit
def _threshold(numbers, count, k):
    """The largest number found in a few bisections that at least ``k`` of the first ``count`` reach."""
    low, high = numbers[0], numbers[0]
    for i in range(count):
        low = min(low, numbers[i])
        high = max(high, numbers[i])
    # Invariant: at least k numbers reach low; fewer than k reach high + 1.
    lower, upper = np.int64(low), np.int64(high) + 1
    slack = k + k // 8
    while upper - lower > 1:
        middle = np.int32((lower + upper) >> 1)
        reached = np.int32(0)
        for i in range(count):
            reached += np.int32(numbers[i] >= middle)
        if reached >= k:
            lower = np.int64(middle)
            if reached <= slack:
                break
        else:
            upper = np.int64(middle)
    return np.int32(lower)


@njit
def _select(numbers, columns, k, scratch, found, best):
    """The ``k`` largest of ``numbers[:columns]`` into ``best``, descending, as ``number << 32 | ~index``.

    The k-th largest maximum of disjoint groups is at most the k-th largest number, and close to it: few
    numbers reach it, and these are ranked by counting.
    """
    groups = columns
    while groups >= 8 * k:
        groups = (groups + 1) // 2
    if groups == columns:
        limit = _threshold(numbers, columns, k)
    else:
        # Group g holds the numbers g, g + groups, g + 2 * groups, ...
        for g in range(groups):
            scratch[g] = numbers[g]
        start = groups
        while start < columns:
            width = min(groups, columns - start)
            for g in range(width):
                scratch[g] = max(scratch[g], numbers[start + g])
            start += groups
        limit = _threshold(scratch, groups, k)
    count = np.int64(0)
    for i in range(columns):  # without a branch, which would be mispredicted at most hits
        scratch[count] = i
        count += np.int64(numbers[i] >= limit)
    for i in range(count):
        index = scratch[i]
        found[i] = (np.int64(numbers[index]) << 32) | (np.int64(0xFFFFFFFF) - index)
    if count <= _MOST_RANKED:
        for i in range(count):
            key = found[i]
            rank = 0
            for j in range(count):
                rank += found[j] > key
            if rank < k:
                best[rank] = key
        return
    # Many equal numbers: keep the k best by insertion.
    kept = 0
    for i in range(count):
        key = found[i]
        if kept == k and key < best[k - 1]:
            continue
        place = kept if kept < k else k - 1
        while place > 0 and best[place - 1] < key:
            best[place] = best[place - 1]
            place -= 1
        best[place] = key
        kept = min(k, kept + 1)


@njit(parallel=True, cache=True)
def _search(first, second, slots, sums):
    heads, tokens, width0 = first.shape
    width1 = second.shape[2]
    reads = slots.shape[2]
    tasks = (tokens + _TASK_ROWS - 1) // _TASK_ROWS
    for task in prange(heads * tasks):
        head = task // tasks
        begin = (task % tasks) * _TASK_ROWS
        pairs = 0
        for i in range(reads):
            pairs += reads // (i + 1)
        widest = max(width0, width1, pairs) + 1
        numbers = np.empty(widest, np.int32)
        scratch = np.empty(widest, np.int32)
        found = np.empty(widest, np.int64)
        best0 = np.empty(reads, np.int64)
        best1 = np.empty(reads, np.int64)
        best = np.empty(reads, np.int64)
        top0 = np.empty(reads, np.int32)
        top1 = np.empty(reads, np.int32)
        pair_sums = np.empty(pairs, np.int32)
        pair_left = np.empty(pairs, np.int32)
        pair_right = np.empty(pairs, np.int32)
        p = 0
        for i in range(reads):
            for j in range(reads // (i + 1)):
                pair_left[p], pair_right[p] = i, j
                p += 1
        values0, values1 = top0.view(np.float32), top1.view(np.float32)
        value_sums = pair_sums.view(np.float32)
        for token in range(begin, min(tokens, begin + _TASK_ROWS)):
            for c in range(width0):
                numbers[c] = _ordered(first[head, token, c])
            _select(numbers, width0, reads, scratch, found, best0)
            for c in range(width1):
                numbers[c] = _ordered(second[head, token, c])
            _select(numbers, width1, reads, scratch, found, best1)
            for r in range(reads):
                top0[r] = _ordered(np.int32(best0[r] >> 32))
                top1[r] = _ordered(np.int32(best1[r] >> 32))
            p = 0
            for i in range(reads):
                for j in range(reads // (i + 1)):
                    value_sums[p + j] = values0[i] + values1[j]
                p += reads // (i + 1)
            for p in range(pairs):
                numbers[p] = _ordered(pair_sums[p])
            _select(numbers, pairs, reads, scratch, found, best)
            for r in range(reads):
                p = np.int64(0xFFFFFFFF) - (best[r] & np.int64(0xFFFFFFFF))
                left = np.int64(0xFFFFFFFF) - (best0[pair_left[p]] & np.int64(0xFFFFFFFF))
                right = np.int64(0xFFFFFFFF) - (best1[pair_right[p]] & np.int64(0xFFFFFFFF))
                slots[token, head, r] = left * width1 + right
                sums[token, head, r] = value_sums[p]
