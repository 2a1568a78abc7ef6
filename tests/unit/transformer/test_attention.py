"""Attention against a naive float64 implementation with complex-number rotations, and its counted cost."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memlm.cost import Flops
from memlm.transformer.attention import Attention, document_mask, rotary_table, rotate
from memlm.transformer.config import TransformerConfig


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
    width = config.head_dim or config.dim // config.heads
    output = torch.zeros(len(hidden), config.heads * width, dtype=torch.float64)

    def mapped(linear, rows):
        bias = linear.bias[rows] if config.attention_bias else 0
        return hidden @ linear.weight[rows].T + bias

    for head in range(config.heads):
        own, shared = slice(head * width, (head + 1) * width), head // group
        kv = slice(shared * width, (shared + 1) * width)
        query = naive_rotate(mapped(layer.query, own), config.rope_theta)
        key = naive_rotate(mapped(layer.key, kv), config.rope_theta)
        value = mapped(layer.value, kv)
        for t in range(len(hidden)):
            seen = [s for s in range(t + 1) if documents is None or documents[s] == documents[t]]
            scores = torch.stack([query[t] @ key[s] / math.sqrt(width) for s in seen])
            output[t, own] = scores.softmax(0) @ value[seen]
    return output @ layer.output.weight.T


@pytest.mark.parametrize(
    "heads,options",
    [
        (1, {"kv_heads": 1}),
        (4, {}),
        (4, {"kv_heads": 2, "attention_bias": True}),
        (6, {"kv_heads": 1, "head_dim": 6}),
        (5, {"head_dim": 2, "attention_bias": True}),
    ],
)
@pytest.mark.parametrize("confined", [False, True])
def test_equals_naive_attention(heads, options, confined):
    torch.manual_seed(heads)
    config = TransformerConfig(dim=24, heads=heads, rope_theta=50.0, **options)
    config.validate()
    layer = Attention(config).double()
    hidden = torch.randn(2, 9, 24, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]]) if confined else None
    table = rotary_table(torch.arange(9), config.resolved_head_dim, config.rope_theta)
    output = layer(hidden, table, None if documents is None else document_mask(documents))
    for row in range(2):
        expected = naive_attention(layer, config, hidden[row], None if documents is None else documents[row])
        # The rotary table is fp32.
        torch.testing.assert_close(output[row], expected, rtol=1e-5, atol=1e-6)


def test_scores_depend_on_relative_positions_only():
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    table = rotary_table(torch.arange(200), 8, 10_000.0)
    at = [rotate(x.expand(200, 8), table) for x in (query, key)]
    for distance in (0, 1, 37):
        scores = (at[0][distance:] * at[1][: 200 - distance]).sum(-1)
        torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-4, atol=1e-4)


def test_document_mask():
    mask = document_mask(torch.tensor([[0, 0, 1, 0]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]


SHAPES = [
    {"dim": 24, "heads": 4},
    {"dim": 24, "heads": 6, "kv_heads": 2, "attention_bias": True},
    {"dim": 20, "heads": 4, "kv_heads": 1, "head_dim": 14},
]


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("length", [1, 8, 50])
def test_flops_equal_torch_s_counter_forward_and_backward(options, length):
    config = TransformerConfig(**options)
    layer = Attention(config)
    hidden = torch.randn(2, length, config.dim, requires_grad=True)
    table = rotary_table(torch.arange(length), config.resolved_head_dim, config.rope_theta)
    # As matrix products: the counter does not know the fused attention of the CPU.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = layer(hidden, table, None)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    counted = layer.flops(length)
    measured = Flops(forward.get_total_flops(), backward.get_total_flops())
    assert counted * hidden[..., 0].numel() == measured


@pytest.mark.parametrize("options", SHAPES)
def test_every_parameter_is_active(options):
    config = TransformerConfig(**options)
    width, kv = config.resolved_head_dim, config.resolved_kv_heads
    weights = config.dim * width * (2 * config.heads + 2 * kv)
    biases = width * (config.heads + 2 * kv) if config.attention_bias else 0
    assert Attention(config).active_parameters() == weights + biases


def test_initial_values():
    torch.manual_seed(0)
    layer = Attention(TransformerConfig(dim=96, heads=8, kv_heads=4, head_dim=30, attention_bias=True))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
        layer.initialise(residual_scale=0.25)
    expected = {"query": 96**-0.5, "key": 96**-0.5, "value": 96**-0.5, "output": 0.25 * 240**-0.5}
    for name, std in expected.items():
        weight = getattr(layer, name).weight
        # The deviation of n draws is known to about 1 / sqrt(2 n).
        assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))
    for name in ("query", "key", "value"):
        assert (getattr(layer, name).bias == 0).all()
    assert layer.output.bias is None
