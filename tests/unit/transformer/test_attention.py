"""Attention against a naive float64 implementation with complex-number rotations."""

import math

import pytest
import torch

from memlm.transformer import TransformerConfig
from memlm.transformer.attention import Attention, document_mask, rotary_table, rotate


def naive_rotate(x, theta):
    """Rotary positions as complex multiplication, one position at a time; x [T, head_dim]."""
    half = x.shape[-1] // 2
    rows = []
    for position, row in enumerate(x):
        angle = torch.tensor([position * theta ** (-2 * d / x.shape[-1]) for d in range(half)]).double()
        turned = torch.complex(row[:half], row[half:]) * torch.polar(torch.ones_like(angle), angle)
        rows.append(torch.cat((turned.real, turned.imag)))
    return torch.stack(rows)


def naive_attention(layer, config, hidden, documents=None):
    """``[T, D]`` to ``[T, D]``, softmax written out for every head and position."""
    group = config.heads // config.resolved_kv_heads
    width = config.head_dim
    output = torch.zeros(len(hidden), config.heads * width, dtype=torch.float64)
    for head in range(config.heads):
        own, shared = slice(head * width, (head + 1) * width), head // group
        kv = slice(shared * width, (shared + 1) * width)
        query = naive_rotate(hidden @ layer.query.weight[own].T, config.rope_theta)
        key = naive_rotate(hidden @ layer.key.weight[kv].T, config.rope_theta)
        value = hidden @ layer.value.weight[kv].T
        for t in range(len(hidden)):
            seen = [s for s in range(t + 1) if documents is None or documents[s] == documents[t]]
            scores = torch.stack([query[t] @ key[s] / math.sqrt(width) for s in seen])
            output[t, own] = scores.softmax(0) @ value[seen]
    return output @ layer.output.weight.T


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (4, None), (4, 2), (6, 1)])
@pytest.mark.parametrize("confined", [False, True])
def test_equals_naive_attention(heads, kv_heads, confined):
    torch.manual_seed(heads)
    config = TransformerConfig(dim=24, heads=heads, kv_heads=kv_heads, rope_theta=50.0)
    layer = Attention(config).double()
    hidden = torch.randn(2, 9, 24, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]]) if confined else None
    table = rotary_table(9, config.head_dim, config.rope_theta, hidden.device)
    output = layer(hidden, table, None if documents is None else document_mask(documents))
    for row in range(2):
        expected = naive_attention(layer, config, hidden[row], None if documents is None else documents[row])
        # The rotary table is fp32.
        torch.testing.assert_close(output[row], expected, rtol=1e-5, atol=1e-6)


def test_scores_depend_on_relative_positions_only():
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    table = rotary_table(200, 8, 10_000.0, torch.device("cpu"))
    at = [rotate(x.expand(200, 8), table) for x in (query, key)]
    for distance in (0, 1, 37):
        scores = (at[0][distance:] * at[1][: 200 - distance]).sum(-1)
        torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-4, atol=1e-4)


def test_document_mask():
    mask = document_mask(torch.tensor([[0, 0, 1, 0]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]
