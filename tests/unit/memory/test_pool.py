"""The pool: one owner of the values, one gradient, observers."""

import copy
import gc
import weakref

import pytest
import torch

from memlm.memory import MemoryConfig, MemoryPool, RowGradient
from memlm.transformer import Transformer, TransformerConfig

SMALL = TransformerConfig(dim=16, layers=4, heads=2, feed_forward_dim=24)


def memory_model(**options) -> Transformer:
    config = {"half_keys": 5, "heads": 2, "reads": 3, "layers": [0, 2, 3], **options}
    return Transformer(11, SMALL, MemoryConfig(**config))


def test_row_gradient_sums_norms_and_scales_like_a_dense_one():
    generator = torch.Generator().manual_seed(0)
    gradient, dense = RowGradient(), torch.zeros(20, 6, dtype=torch.float64)
    for tokens, reads in ((9, 4), (3, 7)):
        slots = torch.randint(20, (tokens, reads), generator=generator)
        weights = torch.rand(tokens, reads, generator=generator, dtype=torch.float64)
        grad = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
        gradient.add(slots, weights, grad)
        dense.index_add_(0, slots.flatten(), (weights.unsqueeze(-1) * grad.unsqueeze(1)).flatten(0, 1))
    torch.testing.assert_close(gradient.norm(), dense.norm())
    gradient.scale_(0.25)
    rows, sums = gradient.compact()
    torch.testing.assert_close(torch.zeros_like(dense).index_copy_(0, rows, sums), dense * 0.25)
    gradient.add(slots, weights, grad)  # the next micro-batch, after somebody looked at the norm
    added = torch.zeros_like(dense).index_add_(
        0, slots.flatten(), (weights.unsqueeze(-1) * grad.unsqueeze(1)).flatten(0, 1)
    )
    rows, sums = gradient.compact()
    torch.testing.assert_close(torch.zeros_like(dense).index_copy_(0, rows, sums), dense * 0.25 + added)
    gradient.clear()
    assert gradient.compact() is None and gradient.norm() is None
    gradient.scale_(2.0)  # of nothing
    gradient.add(slots, weights, grad)
    assert gradient.compact() is not None


def test_the_gradient_does_not_keep_the_forward_graph_alive():
    pool = MemoryPool(10, 3)
    torch.nn.init.ones_(pool.values)
    weights = torch.rand(4, 2, requires_grad=True)

    class Marker(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.marker = torch.zeros(1)
            markers.append(weakref.ref(ctx.marker))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    markers: list = []
    pool.read(torch.zeros(4, 2, dtype=torch.int64), Marker.apply(weights)).sum().backward()
    gc.collect()
    assert markers[0]() is None
    assert pool.gradient.compact() is not None


def test_observers_see_every_read_without_gradient():
    pool = MemoryPool(10, 3)
    torch.nn.init.ones_(pool.values)
    seen = []
    pool.observers.append(lambda slots, weights: seen.append((slots, weights)))
    slots, weights = torch.tensor([[1, 9]]), torch.tensor([[0.25, 0.75]], requires_grad=True)
    pool.read(slots, weights * 1)
    with torch.no_grad():
        pool.read(slots, weights)
    assert len(seen) == 2
    for observed_slots, observed_weights in seen:
        assert torch.equal(observed_slots, slots) and torch.equal(observed_weights, weights)
        assert not observed_weights.requires_grad


def test_writing_values_between_forward_and_backward_is_an_error():
    pool = MemoryPool(10, 3)
    torch.nn.init.ones_(pool.values)
    output = pool.read(torch.tensor([[1, 9]]), torch.tensor([[0.5, 0.5]], requires_grad=True))
    with torch.no_grad():
        pool.values.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        output.sum().backward()


def test_a_shared_table_has_one_state_dict_key_and_no_shared_storage():
    state = memory_model().state_dict()
    assert [key for key in state if "values" in key] == ["pools.main.values"]
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers)
    several = memory_model(layer_pools=["early", "late", "late"]).state_dict()
    assert [key for key in several if "values" in key] == ["pools.early.values", "pools.late.values"]


def test_pools_are_assigned_to_layers_by_name():
    model = memory_model(layer_pools=["early", "late", "late"])
    model(torch.randint(11, (2, 6))).sum().backward()
    compact = {name: pool.gradient.compact() for name, pool in model.pools.items()}
    assert all(part is not None for part in compact.values())
    reads = []
    for pool in model.pools.values():
        pool.observers.append(lambda slots, weights, p=pool: reads.append(p))
        pool.gradient.clear()
    model(torch.randint(11, (2, 6)))
    assert reads == [model.pools["early"], model.pools["late"], model.pools["late"]]


def test_two_models_and_a_deep_copy_share_nothing():
    torch.manual_seed(0)
    first, second = memory_model(), memory_model()
    first(torch.randint(11, (2, 6))).sum().backward()
    assert second.pools["main"].gradient.compact() is None
    twin = copy.deepcopy(first)
    assert twin.pools["main"].gradient is not first.pools["main"].gradient
    pointers = [{p.data_ptr() for p in model.parameters()} for model in (first, second, twin)]
    assert not (pointers[0] & pointers[1] or pointers[0] & pointers[2])
    tokens = torch.randint(11, (2, 6))
    before = first(tokens)
    torch.testing.assert_close(twin(tokens), before, rtol=0, atol=0)
    with torch.no_grad():
        twin.pools["main"].values.zero_()
    assert torch.equal(first(tokens), before)
    assert not torch.equal(twin(tokens), before)
