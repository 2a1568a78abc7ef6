"""The product-key search in Triton: one program finds the best sums of one token and head.

Scores become integers that sort by score, then by index (:func:`_keys`), so that all of them differ and the
result does not depend on the order of the comparisons.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.kernels.interface import slot_dtype


def best_slots(first: Tensor, second: Tensor, reads: int) -> tuple[Tensor, Tensor]:
    """See :meth:`memlm.kernels.interface.Backend.best_slots`. Raises TypeError for fp64 scores."""
    if first.dtype == torch.float64 or second.dtype == torch.float64:
        raise TypeError("the Triton search compares float32 scores; float64 would be rounded")
    heads, tokens, columns0 = first.shape
    columns1 = second.shape[-1]
    slots = first.new_empty(tokens, heads, reads, dtype=slot_dtype(columns0 * columns1))
    sums = first.new_empty(tokens, heads, reads, dtype=torch.float32)
    if sums.numel():
        first, second = (
            scores if scores.stride(-1) == 1 else scores.contiguous() for scores in (first, second)
        )
        keep = max(2, triton.next_power_of_2(reads))
        groups0, members0 = _grouping(columns0, keep)
        groups1, members1 = _grouping(columns1, keep)
        pairs = max(2, triton.next_power_of_2(sum(reads // (i + 1) for i in range(reads))))
        # Up to 256 numbers a single warp sorts with 8 a thread, without shared memory; more take more warps.
        widest = max(groups0, members0 * keep, groups1, members1 * keep, pairs)
        with torch.cuda.device_of(first):
            _best_slots[(tokens * heads,)](
                slots,
                sums,
                first,
                second,
                *first.stride()[:2],
                *second.stride()[:2],
                heads,
                K0=columns0,
                K1=columns1,
                R=reads,
                KEEP=keep,
                PAIRS=pairs,
                GROUPS0=groups0,
                MEMBERS0=members0,
                GROUPS1=groups1,
                MEMBERS1=members1,
                num_warps=min(8, max(1, widest // 256)),
            )
    return slots, sums


def _grouping(columns: int, keep: int) -> tuple[int, int]:
    """Groups and members of each to search ``columns`` numbers for the best ``keep``: powers of two.

    The ``keep`` groups of largest maximum hold the ``keep`` largest numbers, so it is enough to sort the
    maxima, then the members of those groups. Both are fewest with ``sqrt(columns / keep)`` members a group;
    below four a single sort is as good.
    """
    padded = max(keep, triton.next_power_of_2(columns))
    members = 1 << (int(math.log2(padded // keep)) // 2)
    return (padded // members, members) if members >= 4 else (padded, 1)


@triton.jit(do_not_specialize=["stride_h0", "stride_n0", "stride_h1", "stride_n1", "H"])
def _best_slots(
    slots,
    sums,
    first,
    second,
    stride_h0,
    stride_n0,
    stride_h1,
    stride_n1,
    H,
    K0: tl.constexpr,
    K1: tl.constexpr,
    R: tl.constexpr,
    KEEP: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUPS0: tl.constexpr,
    MEMBERS0: tl.constexpr,
    GROUPS1: tl.constexpr,
    MEMBERS1: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    token = program // H
    head = program % H
    best0 = _best(first + head * stride_h0 + token * stride_n0, K0, KEEP, GROUPS0, MEMBERS0)
    best1 = _best(second + head * stride_h1 + token * stride_n1, K1, KEEP, GROUPS1, MEMBERS1)

    # The pairs of ranks with (left + 1)(right + 1) <= R, row by row: see reference.candidate_pairs.
    pair = tl.arange(0, PAIRS)
    left = tl.zeros([PAIRS], tl.int32)
    begin = tl.zeros([PAIRS], tl.int32)
    offset = 0
    for rank in range(1, R):
        offset += R // rank
        left += pair >= offset
        begin = tl.where(pair >= offset, offset, begin)
    right = pair - begin
    real = (left + 1) * (right + 1) <= R
    left = tl.where(real, left, 0)
    right = tl.where(real, right, 0)

    total = _score(tl.gather(best0, left, 0)) + _score(tl.gather(best1, right, 0))
    best = tl.topk(_keys(total, left * KEEP + right, real, KEEP * KEEP), KEEP)
    chosen = _index(best, KEEP * KEEP)
    i = _index(tl.gather(best0, chosen // KEEP, 0), GROUPS0 * MEMBERS0)
    j = _index(tl.gather(best1, chosen % KEEP, 0), GROUPS1 * MEMBERS1)
    rank = tl.arange(0, KEEP)
    slot = i.to(slots.dtype.element_ty) * K1 + j
    tl.store(slots + program * R + rank, slot, rank < R)
    tl.store(sums + program * R + rank, _score(best), rank < R)


@triton.jit
def _best(scores, K: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """Keys of the ``KEEP`` largest of ``K`` scores, descending. A group is every ``GROUPS``-th."""
    index = tl.arange(0, GROUPS)
    keys = _load_keys(scores, index, K, GROUPS * MEMBERS)
    if MEMBERS > 1:
        for member in range(1, MEMBERS):
            keys = tl.maximum(keys, _load_keys(scores, member * GROUPS + index, K, GROUPS * MEMBERS))
        group = _index(tl.topk(keys, KEEP), GROUPS * MEMBERS) % GROUPS
        indices = tl.arange(0, MEMBERS)[:, None] * GROUPS + group[None, :]
        keys = tl.reshape(_load_keys(scores, indices, K, GROUPS * MEMBERS), [MEMBERS * KEEP])
    return tl.topk(keys, KEEP)


@triton.jit
def _load_keys(scores, index, K: tl.constexpr, WIDTH: tl.constexpr):
    score = tl.load(scores + index, index < K, 0.0).to(tl.float32)
    return _keys(score, index, index < K, WIDTH)


@triton.jit
def _keys(score, index, real, WIDTH: tl.constexpr):
    """int64 that rank by score, equal ones by index (below ``WIDTH``), and last what is not real."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals +0
    # Flipping the lower 31 bits of negative floats makes their order that of signed integers.
    number = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)
    return (number.to(tl.int64) << 32) | (WIDTH - 1 - index).to(tl.int64)


@triton.jit
def _score(keys):
    number = (keys >> 32).to(tl.int32)
    return (number ^ ((number >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index(keys, WIDTH: tl.constexpr):
    return WIDTH - 1 - keys.to(tl.int32)
