"""Reads and their gradients, of the reference and the CPU kernels, against brute force in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.kernels import cpu, cpu_reads, reference

BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
SHAPES = [
    (1, 1, 1, 1), (7, 5, 3, 4), (33, 12, 100, 17), (64, 8, 1000, 40), (5, 300, 16, 130), (9, 3, 50, 257)
]  # fmt: skip


def draw(tokens: int, reads: int, slots: int, dim: int, *, skewed: bool, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(slots, dim, generator=generator, dtype=dtype)
    index = torch.randint(slots, (tokens, reads), generator=generator, dtype=torch.int32)
    if skewed:  # most reads fall on one row
        index = torch.where(torch.rand(tokens, reads, generator=generator) < 0.8, slots // 2, index).int()
    weights = torch.randn(tokens, reads, generator=generator)
    grad = torch.randn(tokens, dim, generator=generator)
    return values, index, weights, grad


def brute_force(values, slots, weights, grad):
    """Output, gradient of the weights and dense gradient of the values, in float64."""
    table, bag_weights = values.double().requires_grad_(), weights.double().requires_grad_()
    output = (table[slots.long()] * bag_weights.unsqueeze(-1)).sum(1)
    output.backward(grad.double())
    return output.detach(), bag_weights.grad, table.grad


def check(backend, values, slots, weights, grad, tolerance=1e-4):
    output, grad_weights, grad_values = brute_force(values, slots, weights, grad)
    close = {"rtol": tolerance, "atol": tolerance * 10}
    read = backend.weighted_read(values, slots, weights)
    assert read.dtype == values.dtype
    rounding = {"rtol": 2**-8, "atol": 1e-2} if values.dtype == torch.bfloat16 else close
    torch.testing.assert_close(read.double(), output, **rounding)
    alone = backend.read_weight_gradient(values, slots, grad)
    torch.testing.assert_close(alone.double(), grad_weights, **close)
    fused, sums = backend.read_backward(values, slots, weights, grad)
    torch.testing.assert_close(fused.double(), grad_weights, **close)
    tokens = torch.arange(slots.shape[0], dtype=torch.int32).repeat_interleave(slots.shape[1])
    apart = backend.row_sums(slots.flatten(), weights.flatten(), tokens, grad, values.shape[0])
    for rows, summed, squares, count in (sums, apart):
        assert count is None
        assert rows.tolist() == slots.unique().tolist()
        dense = torch.zeros_like(grad_values).index_copy_(0, rows.long(), summed.double())
        torch.testing.assert_close(dense, grad_values, **close)
        torch.testing.assert_close(squares.double(), summed.double().square().sum(1), **close)


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_and_gradients_equal_brute_force(backend, shape, skewed, dtype, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 500)  # several chunks, an uneven last one
    check(backend, *draw(*shape, skewed=skewed, dtype=dtype))


@BACKENDS
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    reads=st.integers(1, 40),
    slots=st.integers(1, 60),
    dim=st.integers(1, 70),
    skewed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_shapes(backend, tokens, reads, slots, dim, skewed, seed):
    check(backend, *draw(tokens, reads, slots, dim, skewed=skewed, seed=seed))


@BACKENDS
def test_a_hot_row_is_summed_right_across_tasks(backend):
    reads = 3 * cpu_reads._TASK_READS // 8 + 5
    check(backend, *draw(reads, 16, 40, 24, skewed=True))  # one row fills several tasks, ends inside one


@BACKENDS
def test_float64_tables_stay_exact(backend):
    values, slots, weights, grad = draw(20, 6, 30, 9, skewed=True, dtype=torch.float64)
    check(backend, values, slots, weights.double(), grad.double(), tolerance=1e-12)


def test_fp32_read_equals_embedding_bag():
    values, slots, weights, grad = draw(50, 16, 200, 24, skewed=True)
    table, bag_weights = values.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = F.embedding_bag(slots, table, per_sample_weights=bag_weights, mode="sum")
    expected.backward(grad)
    assert torch.equal(cpu.weighted_read(values, slots, weights), expected)
    torch.testing.assert_close(cpu.read_weight_gradient(values, slots, grad), bag_weights.grad)


@BACKENDS
def test_marked_reads_are_left_out(backend):
    _, slots, weights, grad = draw(30, 7, 20, 5, skewed=True)
    marked = torch.rand(30, 7) < 0.5
    kept = backend.row_sums(torch.where(marked, 20, slots).flatten(), weights.flatten(), 7, grad, 20)
    expected = brute_force(torch.zeros(20, 5), slots, weights.masked_fill(marked, 0), grad)[2]
    assert kept.rows.tolist() == slots[~marked].unique().tolist()
    dense = torch.zeros(20, 5).index_copy_(0, kept.rows.long(), kept.sums)
    torch.testing.assert_close(dense, expected.float(), rtol=1e-4, atol=1e-4)
    nothing = backend.row_sums(torch.full((14,), 20), torch.ones(14), 7, grad, 20)
    assert nothing.rows.shape == (0,) and nothing.sums.shape == (0, 5) and nothing.squares.shape == (0,)


@BACKENDS
def test_bf16_gradients_are_summed_in_fp32(backend):
    _, slots, weights, grad = draw(400, 20, 3, 8, skewed=True)
    grad = grad.bfloat16()
    sums = backend.row_sums(slots.flatten(), weights.flatten(), 20, grad, 3).sums
    expected = brute_force(torch.zeros(3, 8), slots, weights, grad)[2]
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-3)


@BACKENDS
def test_empty_batch(backend):
    values, empty, grad = torch.randn(10, 4), torch.empty(0, 8, dtype=torch.int32), torch.empty(0, 4)
    assert backend.weighted_read(values, empty, empty.float()).shape == (0, 4)
    grad_weights, sums = backend.read_backward(values, empty, empty.float(), grad)
    assert grad_weights.shape == (0, 8)
    assert sums.rows.shape == (0,) and sums.sums.shape == (0, 4)


def test_sums_lie_in_the_buffer_if_it_is_large_enough():
    values, slots, weights, grad = draw(30, 7, 20, 5, skewed=False)
    buffer = torch.full((20 * 5,), float("nan"))
    _, sums = cpu.read_backward(values, slots, weights, grad, buffer)
    assert sums.sums.data_ptr() == buffer.data_ptr() and sums.sums.isfinite().all()
    _, fresh = cpu.read_backward(values, slots, weights, grad, buffer[:7])
    assert fresh.sums.data_ptr() != buffer.data_ptr() and torch.equal(fresh.sums, sums.sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    values, slots, weights, grad = draw(2000, 16, 300, 33, skewed=True, dtype=dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            grad_weights, sums = cpu.read_backward(values, slots, weights, grad)
            apart = cpu.row_sums(slots.flatten(), weights.flatten(), 16, grad, 300)
            read = cpu.weighted_read(values, slots, weights)
            alone = cpu.read_weight_gradient(values, slots, grad)
            results.append([grad_weights, *sums[:3], *apart[:3], read, alone])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@BACKENDS
def test_slots_above_two_billion_are_summed_right(backend):
    slots = torch.tensor([2**31 + 3, 5, 2**31 + 3, 2**31 - 1, 2**32], dtype=torch.int64)
    grad = torch.arange(10.0).view(5, 2)
    found = backend.row_sums(slots, torch.ones(5), 1, grad, 2**32)
    assert found.rows.tolist() == [5, 2**31 - 1, 2**31 + 3]  # the last read is marked as left out
    assert found.sums.tolist() == [[2.0, 3.0], [6.0, 7.0], [4.0, 6.0]]
