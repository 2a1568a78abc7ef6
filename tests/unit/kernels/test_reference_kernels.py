"""Value-table operations against brute force in float64, over random shapes and skewed slots."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memlm.kernels import reference
from memlm.kernels.top_k import top_k

SHAPES = [(1, 1, 1, 1), (7, 5, 3, 4), (33, 12, 100, 17), (64, 8, 1000, 40), (5, 300, 16, 130)]


def draw(tokens: int, reads: int, slots: int, dim: int, *, skewed: bool, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens * 1000 + dim)
    values = torch.randn(slots, dim, generator=generator, dtype=dtype)
    index = torch.randint(slots, (tokens, reads), generator=generator)
    if skewed:  # most reads fall on one row
        index = torch.where(torch.rand(tokens, reads, generator=generator) < 0.8, slots // 2, index)
    weights = torch.randn(tokens, reads, generator=generator, dtype=dtype)
    grad = torch.randn(tokens, dim, generator=generator, dtype=dtype)
    return values, index, weights, grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("skewed", [False, True])
def test_read_and_gradients_equal_autograd_of_a_gather(shape, skewed, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 500)  # several chunks, an uneven last one
    values, slots, weights, grad = draw(*shape, skewed=skewed)
    dense_values, dense_weights = values.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = (dense_values[slots] * dense_weights.unsqueeze(-1)).sum(1)
    expected.backward(grad)

    torch.testing.assert_close(reference.weighted_read(values, slots, weights), expected)
    torch.testing.assert_close(reference.read_weight_gradient(values, slots, grad), dense_weights.grad)
    tokens = torch.arange(shape[0]).repeat_interleave(shape[1])
    rows, sums = reference.row_gradients(slots.flatten(), weights.flatten(), tokens, grad)
    assert rows.tolist() == sorted(set(slots.flatten().tolist()))
    torch.testing.assert_close(torch.zeros_like(values).index_copy_(0, rows, sums), dense_values.grad)


def test_fp32_read_equals_embedding_bag_with_dense_gradient():
    values, slots, weights, grad = draw(50, 16, 200, 24, skewed=True, dtype=torch.float32)
    table, bag_weights = values.clone().requires_grad_(), weights.clone().requires_grad_()
    expected = F.embedding_bag(slots, table, per_sample_weights=bag_weights, mode="sum")
    expected.backward(grad)
    assert torch.equal(reference.weighted_read(values, slots, weights), expected)
    torch.testing.assert_close(reference.read_weight_gradient(values, slots, grad), bag_weights.grad)


def test_bf16_row_gradients_are_summed_in_fp32():
    _, slots, weights, grad = draw(400, 20, 3, 8, skewed=True)
    tokens = torch.arange(400).repeat_interleave(20)
    grad, weights = grad.bfloat16(), weights.float()
    _, sums = reference.row_gradients(slots.flatten(), weights.flatten(), tokens, grad)
    _, expected = reference.row_gradients(slots.flatten(), weights.double().flatten(), tokens, grad.double())
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-3)


def test_empty_batch():
    values = torch.randn(10, 4)
    empty = torch.empty(0, 8, dtype=torch.int64)
    assert reference.weighted_read(values, empty, empty.float()).shape == (0, 4)
    rows, sums = reference.row_gradients(
        empty.flatten(), empty.flatten().float(), empty.flatten(), torch.empty(0, 4)
    )
    assert rows.shape == (0,) and sums.shape == (0, 4)


@pytest.mark.parametrize("columns,k", [(1, 1), (7, 7), (50, 16), (128, 16), (513, 32), (40_000, 3)])
def test_top_k_equals_torch(columns, k):
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randn(3, 5, columns, generator=generator)
    scores[0, 0, :] *= 1e30  # far apart exponents
    scores[0, 1, :] = -scores[0, 1].abs()  # negative only
    scores[2, 2, columns // 2] = float("inf")
    scores[2, 3, columns // 3] = -float("inf")
    values, indices = top_k(scores, k)
    assert torch.equal(values, scores.topk(k).values)
    assert torch.equal(scores.gather(-1, indices), values)
    assert all(len(set(row)) == k for row in indices.flatten(0, 1).tolist())


def test_top_k_breaks_ties_by_the_lower_index():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 3, (200, 30), generator=generator).float()
    _, indices = top_k(scores, 12)
    expected = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :12]
    assert np.array_equal(indices.numpy(), expected)


def test_top_k_of_other_dtypes_and_strides():
    scores = torch.randn(30, 6, dtype=torch.float64).t()
    assert torch.equal(top_k(scores, 4)[0], scores.topk(4).values)
    assert torch.equal(top_k(scores.float(), 4)[0], scores.float().topk(4).values)
