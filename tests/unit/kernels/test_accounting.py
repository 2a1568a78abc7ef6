"""Counts against the tensors that the reference operations take and return, and torch's FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memlm.kernels import accounting, reference
from memlm.kernels.accounting import Cost
from memlm.kernels.interface import RowState, RowSums, RowUpdate

SHAPES = [(1, 1, 1), (6, 4, 5), (9, 8, 130)]


def draw(tokens, reads, dim, value_dtype=torch.float32):
    """A table each of whose rows is read exactly once: what is moved is then what the tensors hold."""
    slots = torch.randperm(tokens * reads).to(torch.int32).view(tokens, reads)
    values = torch.randn(tokens * reads, dim).to(value_dtype)
    return values, slots, torch.randn(tokens, reads).to(value_dtype)


def nbytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_forward_moves_what_it_is_given_and_returns(shape, dtype):
    values, slots, weights = draw(*shape, dtype)
    output = reference.weighted_read(values, slots, weights)
    cost = accounting.read_forward(*shape, value_bytes=dtype.itemsize, weight_bytes=dtype.itemsize)
    assert cost.bytes == nbytes(values, slots, weights, output)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(weights.float().unsqueeze(1), values[slots.long()].float())
    assert cost.flops == counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_move_what_they_are_given_and_return_and_the_sort(shape, dtype):
    values, slots, weights = draw(*shape, dtype)
    size = dtype.itemsize
    grad = torch.randn(shape[0], shape[2]).to(dtype)
    grad_weights, sums = reference.read_backward(values, slots, weights, grad)
    assert accounting.read_weight_gradient(*shape, value_bytes=size, gradient_bytes=size).bytes == nbytes(
        values, slots, grad, grad_weights
    )
    count = {"distinct": len(sums.rows), "slots": len(values), "fetched": shape[0]}
    sizes = {"gradient_bytes": size, "weight_bytes": size}
    sort = accounting.sort_reads(slots.numel(), len(values)).bytes
    moved = nbytes(slots, weights, grad, sums.rows, sums.sums, sums.squares)
    assert accounting.row_sums(*shape, **count, **sizes).bytes == moved + sort
    fused = accounting.read_backward(*shape, **count, **sizes, value_bytes=size)
    assert fused.bytes == moved + sort + nbytes(values, grad_weights)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(values[slots.long()].float(), grad.float().unsqueeze(-1))  # the weights' gradient
        torch.bmm(sums.sums.unsqueeze(1), sums.sums.unsqueeze(-1))  # the squares
    # Each read adds one weighted row, as many FLOPs as its weight's gradient.
    extra = 2 * slots.numel() * shape[2]
    assert fused.flops == counter.get_total_flops() + extra


def test_repeated_reads_fetch_at_least_the_distinct_rows():
    every = accounting.read_forward(10, 8, 16)
    distinct = accounting.read_forward(10, 8, 16, fetched=5)
    assert every.bytes - distinct.bytes == 75 * 16 * 4
    assert every.flops == distinct.flops


@pytest.mark.parametrize("slots,passes", [(1, 1), (255, 1), (256, 2), (65_536, 3), (2**30, 4), (2**32, 5)])
def test_passes_of_the_sort(slots, passes):
    # 256 slots need a ninth bit: for the mark of a read to leave out.
    assert accounting.sort_reads(10, slots) == Cost(10 * 8 * 2 * passes, 0)


def test_the_examples_of_the_byte_budget():
    """32k tokens x 128 reads of 1024 bf16 elements: 8.7 GB; 32k x 4 heads x 1,024 half keys: 0.54 GB."""
    read = accounting.read_forward(32_768, 128, 1024, value_bytes=2, weight_bytes=2)
    assert read.bytes == pytest.approx(8.7e9, rel=0.01)
    search = accounting.best_slots(32_768, 4, (1024, 1024), 32, score_bytes=2)
    assert search.bytes == pytest.approx(0.54e9, rel=0.07)
    assert accounting.best_slots(1, 1, (64, 64), 32).flops == 119


STATES = {
    "adamw": ("adamw", ["exp_avg", "exp_avg_sq"]),
    "adamw without momentum": ("adamw", ["exp_avg_sq"]),
    "adamw caught up, decay owed": ("adamw", ["exp_avg", "exp_avg_sq", "last_step", "decayed_at"]),
    "rowwise": ("adamw_rowwise", ["exp_avg", "row_avg_sq"]),
    "rowwise without momentum": ("adamw_rowwise", ["row_avg_sq"]),
    "sgd": ("sgd", []),
    "sgd, decay owed": ("sgd", ["decayed_at"]),
}


def make_state(names, slots, dim, master):
    shapes = {
        "exp_avg": ((slots, dim), torch.float32), "exp_avg_sq": ((slots, dim), torch.float32),
        "row_avg_sq": ((slots,), torch.float32), "last_step": ((slots,), torch.int32),
        "decayed_at": ((slots,), torch.float64), "master": ((slots, dim), torch.float32),
    }  # fmt: skip
    names = [*names, "master"] if master else names
    tensors = {name: torch.zeros(shapes[name][0], dtype=shapes[name][1]) for name in names}
    if "row_avg_sq" in tensors:
        tensors["exp_avg_sq"] = tensors.pop("row_avg_sq")
    return RowState(**tensors)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize(
    "dtype,master", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_update_moves_all_that_it_changes_twice(name, dtype, master):
    slots, dim = 7, 5
    method, names = STATES[name]
    state = make_state(names, slots, dim, master)
    values = torch.ones(slots, dim).to(dtype)
    sums = torch.randn(slots, dim) + 3
    gradient = RowSums(torch.arange(slots, dtype=torch.int32), sums, sums.square().sum(1))
    held = [values, *(tensor for tensor in state if tensor is not None)]
    before = [tensor.clone() for tensor in held]
    betas = (0.9 if state.exp_avg is not None else 0.0, 0.95)
    update = RowUpdate(method, 3, lr=1.0, betas=betas, decay_log=-0.1)
    reference.update_rows(values, state, gradient, None, update)
    assert not any(torch.equal(new, old) for new, old in zip(held, before, strict=True))  # all written
    expected = 2 * nbytes(*held) + nbytes(gradient.rows, sums)
    expected -= values.nbytes if master else 0  # written only
    expected += gradient.squares.nbytes if method == "adamw_rowwise" else 0
    assert accounting.update_rows(slots, values, state, method).bytes == expected


def test_update_of_wide_rows_as_in_the_byte_budget():
    """Per element of a bf16 table: 24 bytes for AdamW, 16 with one second moment a row, 8 for SGD."""
    for name, expected in (("adamw", 24), ("rowwise", 16), ("sgd", 8)):
        method, names = STATES[name]
        with torch.device("meta"):
            values, state = torch.empty(100, 4096, dtype=torch.bfloat16), make_state(names, 100, 4096, False)
        cost = accounting.update_rows(50, values, state, method)
        assert cost.bytes / (50 * 4096) == pytest.approx(expected, abs=0.01)


def test_dense_adamw_passes_over_seven_streams():
    parameter = torch.zeros(30, 4)
    assert accounting.dense_adamw(parameter).bytes == 7 * parameter.nbytes


@pytest.mark.parametrize("half_keys", [(16, 16), (8, 24)])
def test_half_scores_and_search(half_keys):
    tokens, heads, dim, reads = 5, 3, 6, 4
    query = torch.randn(heads, 2, tokens, dim)
    keys = [torch.randn(heads, count, dim) for count in half_keys]
    with FlopCounterMode(display=False) as counter:
        scores = [torch.bmm(query[:, side], keys[side].transpose(1, 2)) for side in (0, 1)]
    cost = accounting.half_scores(tokens, heads, half_keys, dim)
    assert cost == Cost(nbytes(query, *keys, *scores), counter.get_total_flops())
    found = reference.best_slots(*scores, reads)
    assert accounting.best_slots(tokens, heads, half_keys, reads).bytes == nbytes(*scores, *found)
