"""The memory layer against float64 autograd of a brute-force layer that scores every slot."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memlm.memory import MemoryConfig, MemoryLayer, MemoryPool
from memlm.transformer.initialization import _memory_layer

DIM = 6


def build(dtype=torch.float64, seed=0, layers=1, **options):
    """Layers that share a pool, all parameters random, biases and gains too."""
    generator = torch.Generator().manual_seed(seed)
    config = MemoryConfig(**{"half_keys": 7, "heads": 2, "reads": 4, "key_dim": 4, **options})
    config.layers = [0]
    config.validate(DIM, 1)
    made = [MemoryLayer(config, DIM).to(dtype) for _ in range(layers)]
    pool = MemoryPool(config.slots, config.resolved_value_dim(DIM), alone=layers == 1).to(dtype)
    for module in (*made, pool):
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return made, pool


def brute_force(layer: MemoryLayer, parameters: dict, hidden, values):
    """The layer's formula over explicit full keys and a dense table; shares only names with the code."""
    keys = parameters["product_keys.keys"]
    heads, half_keys, half = keys.shape[0], layer.product_keys.half_keys, keys.shape[-1]
    tokens = hidden.flatten(0, -2)
    query = tokens @ parameters["query.linear.weight"].T + parameters["query.linear.bias"]
    if "query.batch_norm.weight" in parameters:
        centred = query - query.mean(0)
        query = centred / (centred.square().mean(0) + 1e-5).sqrt()
        query = query * parameters["query.batch_norm.weight"] + parameters["query.batch_norm.bias"]
    query = query.view(len(tokens), heads, 2, half)
    if "query.qk_gain" in parameters:
        query = query / query.square().mean(-1, keepdim=True).sqrt() * parameters["query.qk_gain"]
        keys = keys / keys.square().mean(-1, keepdim=True).sqrt()
    pairs = list(itertools.product(*map(range, half_keys)))
    full_keys = torch.stack(
        [torch.cat((keys[:, i], keys[:, half_keys[0] + j]), -1) for i, j in pairs], 1
    )  # [H, S, 2C]
    scores = torch.einsum("nhc,hsc->nhs", query.flatten(2), full_keys)
    chosen = scores.argsort(-1, descending=True)[..., : layer.product_keys.reads]
    weights = scores.gather(-1, chosen).softmax(-1)
    dense = torch.zeros_like(scores).scatter(-1, chosen, weights).sum(1)  # [N, S]
    output = dense @ values
    if layer.gate is not None:
        output = output * F.silu(tokens @ parameters["gate.weight"].T + parameters["gate.bias"])
    if layer.projection is not None:
        output = output @ parameters["projection.weight"].T + parameters["projection.bias"]
    return output.view_as(hidden)


def dense_gradient(pool: MemoryPool) -> torch.Tensor:
    result = torch.zeros_like(pool.values)
    compact = pool.gradient.compact()
    assert compact is not None
    rows, sums = compact.rows, compact.sums
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert not sums.requires_grad
    return result.index_copy_(0, rows.long(), sums.to(result.dtype))


def leaves(module):
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def check_against_brute_force(layers, pool, tolerance=1e-10, micro_batches=1, skewed=False):
    generator = torch.Generator().manual_seed(5)
    oracle = [leaves(layer) for layer in layers]
    table = pool.values.detach().clone().requires_grad_()
    for _ in range(micro_batches):
        hidden = torch.randn(3, 5, DIM, generator=generator, dtype=torch.float64)
        if skewed:  # nearly equal tokens, which read the same rows
            hidden = hidden[:1, :1] + 1e-3 * hidden
        grad = torch.randn(3, 5, DIM, generator=generator, dtype=torch.float64)
        ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        output, expected = ours, theirs
        for layer, parameters in zip(layers, oracle, strict=True):
            output = layer(output, pool)
            expected = brute_force(layer, parameters, expected, table)
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        output.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    for layer, parameters in zip(layers, oracle, strict=True):
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(
                parameter.grad,
                parameters[name].grad,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    assert pool.values.grad is None
    torch.testing.assert_close(dense_gradient(pool), table.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate,projection", list(itertools.product(["silu", "none"], [True, False])))
@pytest.mark.parametrize("query_norm", ["none", "batch", "qk"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_output_and_all_gradients_equal_the_brute_force_layer(gate, projection, query_norm, heads):
    layers, pool = build(
        seed=heads, gate=gate, projection=projection, query_norm=query_norm, heads=heads,
        value_dim=9 if projection else None,
    )  # fmt: skip
    check_against_brute_force(layers, pool)


@pytest.mark.parametrize(
    "options",
    [
        {"half_keys": 1, "reads": 1, "key_dim": 2, "value_dim": 1},
        {"half_keys": 3, "reads": 3, "heads": 3, "key_dim": 10, "value_dim": 33},
        {"half_keys": 12, "reads": 11, "key_dim": 6, "value_dim": 5},
        {"half_keys": (5, 9), "reads": 4, "value_dim": 3, "query_norm": "qk"},
        {"half_keys": (11, 4), "reads": 4, "heads": 1},
    ],
)
def test_odd_shapes(options):
    check_against_brute_force(*build(**options))


def test_skewed_reads():
    check_against_brute_force(*build(value_dim=4), skewed=True, tolerance=1e-9)


def test_layers_and_micro_batches_share_one_gradient():
    layers, pool = build(layers=2, value_dim=5)
    check_against_brute_force(layers, pool, micro_batches=2)


def test_weights_are_a_softmax_for_each_head():
    (layer,), _ = build(dtype=torch.float32, heads=3)
    slots, weights = layer.address(torch.randn(8, DIM))
    assert slots.shape == weights.shape == (8, 3, 4)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 3))
    assert (weights.diff(dim=-1) <= 0).all()


def test_batch_norm_uses_running_statistics_in_evaluation():
    (layer,), pool = build(query_norm="batch")
    hidden = torch.randn(40, DIM, dtype=torch.float64)
    for _ in range(200):
        layer.address(hidden)
    layer.eval()
    together = layer(hidden, pool)
    one_by_one = torch.cat([layer(hidden[i : i + 1], pool) for i in range(40)])
    torch.testing.assert_close(together, one_by_one)


def test_qk_norm_ignores_the_scale_of_keys():
    (layer,), pool = build(query_norm="qk")
    hidden = torch.randn(10, DIM, dtype=torch.float64)
    before = layer(hidden, pool)
    layer.product_keys.keys.data *= 7
    torch.testing.assert_close(layer(hidden, pool), before)


def test_frozen_values_and_no_grad_record_nothing():
    (layer,), pool = build()
    hidden = torch.randn(4, DIM, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer(hidden, pool)
    pool.values.requires_grad_(False)
    layer(hidden, pool).sum().backward()
    assert pool.gradient.compact() is None and pool.gradient.norm() is None
    assert hidden.grad is not None and layer.product_keys.keys.grad is not None


def test_frozen_query_still_trains_the_values():
    (layer,), pool = build(gate="none", projection=False)
    layer.requires_grad_(False)
    layer(torch.randn(4, DIM, dtype=torch.float64), pool).sum().backward()
    assert pool.gradient.norm() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    results = []
    for wrap in (False, True):
        (layer,), pool = build()
        hidden = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        hidden.requires_grad_()
        output = checkpoint(layer, hidden, pool, use_reentrant=use_reentrant) if wrap else layer(hidden, pool)
        output.square().sum().backward()
        results.append([output, hidden.grad, *(p.grad for p in layer.parameters()), dense_gradient(pool)])
    for plain, wrapped in zip(*results, strict=True):
        assert torch.equal(plain, wrapped)


@pytest.mark.parametrize("query_norm", ["none", "batch", "qk"])
def test_bf16_autocast_is_close_to_fp32(query_norm):
    torch.manual_seed(0)
    config = MemoryConfig(half_keys=8, heads=2, reads=8, key_dim=16, layers=[0], query_norm=query_norm)
    layer, pool = MemoryLayer(config, 32), MemoryPool(64, 32)
    _memory_layer(layer)
    torch.nn.init.normal_(pool.values)
    hidden, grad = torch.randn(2, 200, 32, 32).unbind()
    results = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = layer(hidden, pool)
        output.float().backward(grad)
        results.append([output.float(), layer.gate.weight.grad, dense_gradient(pool)])
        pool.gradient.clear()
    for exact, rounded in zip(*results, strict=True):
        # Most of it stems from tokens whose last read is nearly tied, and becomes another slot.
        assert (exact - rounded).norm() / exact.norm() < 0.1


def test_bf16_values_are_read_and_trained():
    layers, pool = build(dtype=torch.bfloat16)
    assert layers[0](torch.randn(4, DIM).bfloat16(), pool).dtype == torch.bfloat16
    layers[0](torch.randn(4, DIM).bfloat16(), pool).sum().backward()
    rows, sums, *_ = pool.gradient.compact()
    assert sums.dtype == torch.float32 and sums.isfinite().all() and len(rows)


def test_a_deep_copy_is_independent_even_after_a_backward_pass():
    (layer,), pool = build()
    hidden = torch.randn(4, DIM, dtype=torch.float64)
    layer(hidden, pool).sum().backward()
    twin = copy.deepcopy(pool)
    assert twin.gradient is not pool.gradient
    torch.testing.assert_close(dense_gradient(twin), dense_gradient(pool))
    pool.gradient.clear()
    twin.gradient.clear()
    layer(hidden, pool).sum().backward()
    assert twin.gradient.compact() is None and pool.gradient.compact() is not None
    twin.values.data.zero_()
    assert pool.values.abs().sum() > 0
