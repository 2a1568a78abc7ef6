"""The memory layer against float64 autograd of a brute-force layer that scores every slot."""

import copy
import itertools

import pytest
import torch
from memory_oracle import DIM, build, check_against_brute_force, dense_gradient
from torch.utils.checkpoint import checkpoint

from memlm.memory import MemoryConfig, MemoryLayer, MemoryPool


@pytest.mark.parametrize("gate,projection", list(itertools.product(["silu", "none"], [True, False])))
@pytest.mark.parametrize("query_norm", ["none", "batch", "qk"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_output_and_all_gradients_equal_the_brute_force_layer(gate, projection, query_norm, heads):
    layers, pools = build(
        seed=heads, gate=gate, projection=projection, query_norm=query_norm, heads=heads,
        value_dim=9 if projection else None,
    )  # fmt: skip
    check_against_brute_force(layers, pools)


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
    layers, pools = build(layers=2, value_dim=5)
    check_against_brute_force(layers, pools, micro_batches=2)


def test_weights_are_a_softmax_for_each_head():
    (layer,), _ = build(dtype=torch.float32, heads=3)
    slots, weights = layer.address(torch.randn(8, DIM))
    assert slots.shape == weights.shape == (8, 3, 4)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 3))
    assert (weights.diff(dim=-1) <= 0).all()


def test_batch_norm_uses_running_statistics_in_evaluation():
    (layer,), pools = build(query_norm="batch")
    hidden = torch.randn(40, DIM, dtype=torch.float64)
    for _ in range(200):
        layer.address(hidden)
    layer.eval()
    together = layer(hidden, pools)
    one_by_one = torch.cat([layer(hidden[i : i + 1], pools) for i in range(40)])
    torch.testing.assert_close(together, one_by_one)


def test_qk_norm_ignores_the_scale_of_keys():
    (layer,), pools = build(query_norm="qk")
    hidden = torch.randn(10, DIM, dtype=torch.float64)
    before = layer(hidden, pools)
    layer.product_keys.keys.data *= 7
    torch.testing.assert_close(layer(hidden, pools), before)


def test_frozen_values_and_no_grad_record_nothing():
    (layer,), pools = build()
    (pool,) = pools
    hidden = torch.randn(4, DIM, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer(hidden, pools)
    pool.values.requires_grad_(False)
    layer(hidden, pools).sum().backward()
    assert pool.gradient.compact() is None and pool.gradient.norm() is None
    assert hidden.grad is not None and layer.product_keys.keys.grad is not None


def test_frozen_query_still_trains_the_values():
    (layer,), pools = build(gate="none", projection=False)
    (pool,) = pools
    layer.requires_grad_(False)
    layer(torch.randn(4, DIM, dtype=torch.float64), pools).sum().backward()
    assert pool.gradient.norm() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("pre_values", ["none", "silu"])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant, pre_values):
    results = []
    for wrap in (False, True):
        (layer,), pools = build(pre_values=pre_values)
        hidden = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        hidden.requires_grad_()
        output = (
            checkpoint(layer, hidden, pools, use_reentrant=use_reentrant) if wrap else layer(hidden, pools)
        )
        output.square().sum().backward()
        gradients = [*(p.grad for p in layer.parameters()), *map(dense_gradient, pools)]
        results.append([output, hidden.grad, *gradients])
    for plain, wrapped in zip(*results, strict=True):
        assert torch.equal(plain, wrapped)


@pytest.mark.parametrize("query_norm", ["none", "batch", "qk"])
def test_bf16_autocast_is_close_to_fp32(query_norm):
    torch.manual_seed(0)
    config = MemoryConfig(half_keys=8, heads=2, reads=8, key_dim=16, layers=[0], query_norm=query_norm)
    layer, pool = MemoryLayer(config, 32), MemoryPool(64, 32)
    layer.initialise(1.0)
    torch.nn.init.normal_(pool.values)
    hidden, grad = torch.randn(2, 200, 32, 32).unbind()
    results = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = layer(hidden, [pool])
        output.float().backward(grad)
        results.append([output.float(), layer.gate.weight.grad, dense_gradient(pool)])
        pool.gradient.clear()
    for exact, rounded in zip(*results, strict=True):
        # Most of it stems from tokens whose last read is nearly tied, and becomes another slot.
        assert (exact - rounded).norm() / exact.norm() < 0.1


def test_bf16_values_are_read_and_trained():
    layers, pools = build(dtype=torch.bfloat16)
    (pool,) = pools
    assert layers[0](torch.randn(4, DIM).bfloat16(), pools).dtype == torch.bfloat16
    layers[0](torch.randn(4, DIM).bfloat16(), pools).sum().backward()
    rows, sums, *_ = pool.gradient.compact()
    assert sums.dtype == torch.float32 and sums.isfinite().all() and len(rows)


def test_a_deep_copy_is_independent_even_after_a_backward_pass():
    (layer,), pools = build()
    (pool,) = pools
    hidden = torch.randn(4, DIM, dtype=torch.float64)
    layer(hidden, pools).sum().backward()
    twin = copy.deepcopy(pool)
    assert twin.gradient is not pool.gradient
    torch.testing.assert_close(dense_gradient(twin), dense_gradient(pool))
    pool.gradient.clear()
    twin.gradient.clear()
    layer(hidden, pools).sum().backward()
    assert twin.gradient.compact() is None and pool.gradient.compact() is not None
    twin.values.data.zero_()
    assert pool.values.abs().sum() > 0
