"""Product keys against a full search over all pairs of half keys, and its gradients."""

import pytest
import torch

from memlm.memory import ProductKeys


def half_scores(query, keys, first):
    """``[N, H, K0]`` and ``[N, H, K1]``."""
    return (
        torch.einsum("nhc,hkc->nhk", query[:, :, 0], keys[:, :first]),
        torch.einsum("nhc,hkc->nhk", query[:, :, 1], keys[:, first:]),
    )


def full(query, keys, first):
    """Scores of all slots, ``[N, H, S]``."""
    left, right = half_scores(query, keys, first)
    return (left.unsqueeze(-1) + right.unsqueeze(-2)).flatten(2)


def make(heads, grid, dim, reads, dtype=torch.float32, tokens=50, **options):
    generator = torch.Generator().manual_seed(grid[0])
    layer = ProductKeys(heads, grid, dim, reads, **options).to(dtype)
    layer.keys.data = torch.randn(layer.keys.shape, generator=generator).to(dtype)
    return layer, torch.randn(tokens, heads, 2, dim, generator=generator).to(dtype)


@pytest.mark.parametrize(
    "heads,grid,dim,reads",
    [(1, (1, 1), 1, 1), (3, (9, 9), 4, 9), (2, (40, 16), 6, 16), (4, (33, 90), 8, 5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_full_search(heads, grid, dim, reads, dtype, ties):
    layer, query = make(heads, grid, dim, reads, dtype)
    if ties:  # small integers: many equal scores, and every sum is exact
        layer.keys.data, query = layer.keys.data.round(), query.round()
    slots, scores = layer(query)
    everything = full(query, layer.keys, grid[0])
    exact = {"rtol": 0, "atol": 0} if ties else {}
    torch.testing.assert_close(scores, everything.topk(reads, dim=-1).values, **exact)
    torch.testing.assert_close(everything.gather(-1, slots.long()), scores, **exact)
    assert all(len(set(row)) == reads for row in slots.flatten(0, 1).tolist())


@pytest.mark.parametrize("kernels,dtype", [("reference", torch.float64), ("cpu", torch.float32)])
@pytest.mark.parametrize("grid", [(12, 12), (12, 31)])
def test_gradients_equal_those_of_the_full_search(kernels, dtype, grid):
    layer, query = make(2, grid, 5, 7, dtype, tokens=20, kernels=kernels)
    query.requires_grad_()
    grad = torch.randn(20, 2, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    slots, scores = layer(query)
    scores.backward(grad)
    exact_query = query.detach().double().requires_grad_()
    exact_keys = layer.keys.detach().double().requires_grad_()
    full(exact_query, exact_keys, grid[0]).gather(-1, slots.long()).backward(grad.double())
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(query.grad.double(), exact_query.grad, **close)
    torch.testing.assert_close(layer.keys.grad.double(), exact_keys.grad, **close)


def test_pieces_of_a_long_batch_are_searched_as_one(monkeypatch):
    layer, query = make(2, (20, 30), 4, 6)
    whole = layer(query)
    monkeypatch.setattr("memlm.kernels.operators._SCORE_ELEMENTS", 700)  # 7 tokens at a time
    slots, scores = layer(query)
    torch.testing.assert_close(scores, whole[1])
    assert (slots == whole[0]).float().mean() > 0.999  # a matrix product of another shape may round apart


def test_no_tokens():
    layer, query = make(2, (8, 8), 4, 3, tokens=0)
    slots, scores = layer(query.requires_grad_())
    assert slots.shape == scores.shape == (0, 2, 3)
    scores.sum().backward()
    assert query.grad.shape == (0, 2, 2, 4) and not layer.keys.grad.any()


def test_bf16_half_scores_are_added_in_fp32():
    layer, query = make(2, (64, 64), 8, 16)
    query = query.bfloat16()
    slots, scores = layer(query)
    halves = [
        torch.bmm(query[:, :, half].transpose(0, 1), layer.keys[:, part].bfloat16().transpose(1, 2)).float()
        for half, part in ((0, slice(0, 64)), (1, slice(64, 128)))
    ]
    everything = (halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)).flatten(2).transpose(0, 1)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, everything.topk(16).values)
    assert torch.equal(everything.gather(-1, slots.long()), scores)
