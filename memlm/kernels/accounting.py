"""Bytes and FLOPs that each operation of the value table must move and do at least.

The letters are those of :mod:`memlm.kernels.interface`. Every count is of one pass over what an operation is
given and what it returns; what a cache may save is the caller's to say: ``fetched`` is how many times a row
comes from memory. Its default, once for each read, is what happens where the table is much larger than the
cache and reads are uniform; the number of distinct rows is the limit that no implementation can go below.

A multiply-add is two FLOPs; a square root or a division is one; conversions, comparisons and integer
arithmetic are none.
"""

from dataclasses import dataclass

from torch import Tensor

from memlm.kernels.interface import Method, RowState

# Bits of one digit of a radix sort.
_DIGIT = 8
# A read's slot and its position, as a sort moves them.
_PAIR_BYTES = 8


@dataclass(frozen=True)
class Cost:
    """What an operation moves and does."""

    bytes: int
    """Read from and written to memory."""
    flops: int
    """Floating-point operations."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def read_forward(
    tokens: int,
    reads: int,
    value_dim: int,
    *,
    value_bytes: int = 4,
    slot_bytes: int = 4,
    weight_bytes: int = 4,
    fetched: int | None = None,
) -> Cost:
    """Weighted read: rows, slots and weights in, one vector a token out.

    Args:
        tokens: ``N``.
        reads: ``L`` of a token.
        value_dim: ``V``.
        value_bytes: Of an element of a value and of the output.
        slot_bytes: Of a slot.
        weight_bytes: Of a weight.
        fetched: Rows that come from memory; default: one for each read.
    """
    total = tokens * reads
    rows = total if fetched is None else fetched
    elements = (rows + tokens) * value_dim
    return Cost(elements * value_bytes + total * (slot_bytes + weight_bytes), 2 * total * value_dim)


def read_weight_gradient(
    tokens: int,
    reads: int,
    value_dim: int,
    *,
    value_bytes: int = 4,
    gradient_bytes: int = 4,
    slot_bytes: int = 4,
    fetched: int | None = None,
) -> Cost:
    """Gradient of the weights: rows, slots and the output's gradient in, one fp32 number a read out.

    Args:
        tokens: ``N``.
        reads: ``L`` of a token.
        value_dim: ``V``.
        value_bytes: Of an element of a value.
        gradient_bytes: Of an element of the output's gradient.
        slot_bytes: Of a slot.
        fetched: Rows of the table that come from memory; default: one for each read.
    """
    total = tokens * reads
    rows = total if fetched is None else fetched
    elements = value_dim * (rows * value_bytes + tokens * gradient_bytes)
    return Cost(elements + total * (slot_bytes + 4), 2 * total * value_dim)


def sort_reads(reads: int, slots: int) -> Cost:
    """Radix sort of reads by slot: each pass, of an 8-bit digit, reads and writes all (slot, position) pairs.

    Args:
        reads: ``M``.
        slots: ``S``; a slot and the mark of a read to leave out take ``log2(S + 1)`` bits.
    """
    passes = -(-slots.bit_length() // _DIGIT)
    return Cost(2 * passes * reads * _PAIR_BYTES, 0)


def row_sums(
    tokens: int,
    reads: int,
    value_dim: int,
    *,
    distinct: int,
    slots: int,
    gradient_bytes: int = 4,
    slot_bytes: int = 4,
    weight_bytes: int = 4,
    fetched: int | None = None,
) -> Cost:
    """Compact gradient: slots, weights and the output's gradient in; rows, sums and squares out; one sort.

    Args:
        tokens: ``N``.
        reads: ``L`` of a token.
        value_dim: ``V``.
        distinct: ``U``, rows touched.
        slots: ``S``.
        gradient_bytes: Of an element of the output's gradient.
        slot_bytes: Of a slot.
        weight_bytes: Of a weight.
        fetched: Rows of the output's gradient that come from memory; default: one for each read (they
            are read in the order of slots). The limit is ``tokens``.
    """
    total = tokens * reads
    rows = total if fetched is None else fetched
    given = rows * value_dim * gradient_bytes + total * (slot_bytes + weight_bytes)
    returned = distinct * (value_dim * 4 + 4 + slot_bytes)
    return Cost(given + returned, 2 * value_dim * (total + distinct)) + sort_reads(total, slots)


def read_backward(
    tokens: int,
    reads: int,
    value_dim: int,
    *,
    distinct: int,
    slots: int,
    value_bytes: int = 4,
    gradient_bytes: int = 4,
    slot_bytes: int = 4,
    weight_bytes: int = 4,
    fetched: int | None = None,
) -> Cost:
    """Both gradients of a read in one pass: as :func:`row_sums`, and each distinct row of the table once.

    Args:
        tokens: ``N``.
        reads: ``L`` of a token.
        value_dim: ``V``.
        distinct: ``U``, rows touched.
        slots: ``S``.
        value_bytes: Of an element of a value.
        gradient_bytes: Of an element of the output's gradient.
        slot_bytes: Of a slot.
        weight_bytes: Of a weight.
        fetched: As in :func:`row_sums`.
    """
    sums = row_sums(
        tokens,
        reads,
        value_dim,
        distinct=distinct,
        slots=slots,
        gradient_bytes=gradient_bytes,
        slot_bytes=slot_bytes,
        weight_bytes=weight_bytes,
        fetched=fetched,
    )
    total = tokens * reads
    return sums + Cost(distinct * value_dim * value_bytes + total * 4, 2 * total * value_dim)


def update_rows(rows: int, values: Tensor, state: RowState, method: Method) -> Cost:
    """Row optimizer: gradient in, value and state in and out; of the rows that move and no others.

    For AdamW ``24 U V`` bytes of a bf16 table and ``28 U V`` of an fp32 one, and a few bytes a row.

    Args:
        rows: ``U``.
        values: ``[S, V]``; only its shape and dtype count.
        state: Likewise.
        method: Of the update.
    """
    dim = values.shape[1]
    # With masters the bf16 values are written, never read.
    element = values.element_size() * (2 if state.master is None else 1)
    element += sum(
        2 * tensor.element_size() for tensor in (state.master, state.exp_avg) if tensor is not None
    )
    element += 8 if values.element_size() == 8 else 4  # the gradient
    row = 4  # its number
    flops = 2  # the clipping factor, and p - x
    if state.exp_avg_sq is not None:
        if method == "adamw":
            element += 2 * state.exp_avg_sq.element_size()
        else:
            row += 2 * state.exp_avg_sq.element_size() + 4  # and the gradient's sum of squares
    for tensor in (state.last_step, state.decayed_at):
        row += 0 if tensor is None else 2 * tensor.element_size()
    if state.decayed_at is not None:
        flops += 1
    if state.exp_avg is not None:
        flops += 3
    flops += {"adamw": 9, "adamw_rowwise": 1, "sgd": 1}[method]
    return Cost(rows * (dim * element + row), rows * dim * flops)


def dense_adamw(parameter: Tensor) -> Cost:
    """torch's fused AdamW: gradient in, parameter and both moments in and out, all of one dtype."""
    return Cost(7 * parameter.numel() * parameter.element_size(), 14 * parameter.numel())


def half_scores(
    tokens: int, heads: int, half_keys: tuple[int, int], half_key_dim: int, *, element_bytes: int = 4
) -> Cost:
    """Scores of all half keys of both sets: queries and keys in, scores out.

    Args:
        tokens: ``N``.
        heads: ``H``.
        half_keys: ``K0`` and ``K1``.
        half_key_dim: ``C``.
        element_bytes: Of queries, keys and scores.
    """
    keys = sum(half_keys)
    elements = heads * (2 * tokens * half_key_dim + keys * half_key_dim + tokens * keys)
    return Cost(elements * element_bytes, 2 * heads * tokens * keys * half_key_dim)


def best_slots(
    tokens: int,
    heads: int,
    half_keys: tuple[int, int],
    reads: int,
    *,
    score_bytes: int = 4,
    slot_bytes: int = 4,
) -> Cost:
    """Search: half scores in, slots and fp32 sums of the best pairs out.

    Its FLOPs are the sums of the candidate pairs, those of ranks with ``(i+1)(j+1) <= R``.

    Args:
        tokens: ``N``.
        heads: ``H``.
        half_keys: ``K0`` and ``K1``.
        reads: ``R`` of a head.
        score_bytes: Of a half score.
        slot_bytes: Of a slot.
    """
    rows = tokens * heads
    pairs = sum(reads // (rank + 1) for rank in range(reads))
    return Cost(rows * (sum(half_keys) * score_bytes + reads * (slot_bytes + 4)), rows * pairs)
