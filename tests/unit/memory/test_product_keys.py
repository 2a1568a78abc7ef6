"""Product keys against a full search over all pairs of half keys, ties included."""

import pytest
import torch

from memlm.memory import ProductKeys, candidate_pairs


@pytest.mark.parametrize("reads,count", [(1, 1), (4, 8), (8, 20), (16, 50), (32, 119), (64, 280)])
def test_candidates_are_the_pairs_under_the_hyperbola(reads, count):
    pairs = {tuple(pair) for pair in candidate_pairs(reads).tolist()}
    assert len(pairs) == count
    assert pairs == {(i, j) for i in range(reads) for j in range(reads) if (i + 1) * (j + 1) <= reads}


@pytest.mark.parametrize(
    "heads,half_keys,dim,reads", [(1, 1, 1, 1), (3, 9, 4, 9), (2, 40, 6, 16), (4, 33, 8, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_full_search(heads, half_keys, dim, reads, dtype, ties):
    generator = torch.Generator().manual_seed(half_keys)
    layer = ProductKeys(heads, half_keys, dim, reads)
    keys = torch.randn(heads, 2, half_keys, dim, generator=generator).to(dtype)
    query = torch.randn(50, heads, 2, dim, generator=generator).to(dtype)
    if ties:  # small integers: many equal scores, and every sum is exact
        keys, query = keys.round(), query.round()
    layer.keys.data = keys
    slots, scores = layer(query)

    half = torch.einsum("nhpc,hpkc->nhpk", query, keys)
    full = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)
    expected = full.topk(reads, dim=-1).values
    exact = {"rtol": 0, "atol": 0} if ties else {}
    torch.testing.assert_close(scores, expected, **exact)
    torch.testing.assert_close(full.gather(-1, slots), scores, **exact)
    assert all(len(set(row)) == reads for row in slots.flatten(0, 1).tolist())


def test_gradients_equal_those_of_the_full_search():
    generator = torch.Generator().manual_seed(1)
    layer = ProductKeys(2, 12, 5, 7).double()
    keys = torch.randn(2, 2, 12, 5, generator=generator, dtype=torch.float64)
    layer.keys.data = keys.clone()
    query = torch.randn(20, 2, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(20, 2, 7, generator=generator, dtype=torch.float64)
    slots, scores = layer(query)
    scores.backward(grad)

    full_query, full_keys = query.detach().clone().requires_grad_(), keys.clone().requires_grad_()
    half = torch.einsum("nhpc,hpkc->nhpk", full_query, full_keys)
    full = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)
    full.gather(-1, slots).backward(grad)
    torch.testing.assert_close(query.grad, full_query.grad)
    torch.testing.assert_close(layer.keys.grad, full_keys.grad)


def test_bf16_half_scores_are_added_in_fp32():
    generator = torch.Generator().manual_seed(2)
    layer = ProductKeys(2, 64, 8, 16)
    layer.keys.data = torch.randn(2, 2, 64, 8, generator=generator)
    query = torch.randn(100, 2, 2, 8, generator=generator).bfloat16()
    slots, scores = layer(query)
    half = torch.bmm(
        query.flatten(1, 2).transpose(0, 1), layer.keys.flatten(0, 1).transpose(1, 2).bfloat16()
    ).float()
    half = half.unflatten(0, (2, 2)).transpose(0, 2).transpose(1, 2)  # [N, H, 2, K]
    full = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, full.topk(16).values)
    assert torch.equal(full.gather(-1, slots), scores)
