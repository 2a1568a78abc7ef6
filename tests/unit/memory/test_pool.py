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


def draw(tokens, reads, seed, rows=20, dim=6):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(rows, (tokens, reads), generator=generator, dtype=torch.int32)
    weights = torch.rand(tokens, reads, generator=generator)
    return slots, weights, torch.randn(tokens, dim, generator=generator)


def dense(reads, rows=20, dim=6):
    """The gradient of a table, by brute force in float64."""
    result = torch.zeros(rows, dim, dtype=torch.float64)
    for slots, weights, grad in reads:
        products = weights.double().unsqueeze(-1) * grad.double().unsqueeze(1)
        result.index_add_(0, slots.flatten(), products.flatten(0, 1))
    return result


def check(gradient, expected):
    found = gradient.compact()
    assert found.rows.tolist() == expected.any(1).nonzero().flatten().tolist()
    scale = 1.0 if gradient.factor is None else gradient.factor.double()
    sums = torch.zeros_like(expected).index_copy_(0, found.rows.long(), found.sums.double() * scale)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.norm().double(), expected.norm(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("alone", [False, True])
def test_row_gradient_sums_norms_and_scales_like_a_dense_one(kernels, alone):
    gradient, values = RowGradient(20, kernels, alone), torch.randn(20, 6)
    first, second, third = draw(9, 4, 0), draw(3, 7, 1), draw(5, 2, 2)
    for part in (first, second):
        grad_weights = gradient.take(values, *part)
        slots, _, grad = part
        torch.testing.assert_close(grad_weights, (values[slots] * grad.unsqueeze(1)).sum(-1))
    check(gradient, dense([first, second]))
    gradient.scale_(0.25)
    check(gradient, dense([first, second]) * 0.25)
    assert gradient.take(values, *third, need_weights=False) is None  # after somebody looked at the norm
    check(gradient, dense([first, second]) * 0.25 + dense([third]))
    gradient.clear()
    assert gradient.compact() is None and gradient.norm() is None
    gradient.scale_(2.0)  # of nothing
    gradient.take(values, *first)
    check(gradient, dense([first]))


@pytest.mark.parametrize("alone", [False, True])
def test_only_rows_that_pass_the_filter_have_a_gradient(alone):
    gradient, values = RowGradient(20, alone=alone), torch.randn(20, 6)
    reads = draw(30, 4, 0)
    gradient.row_filter = torch.arange(20) % 3 == 0
    grad_weights = gradient.take(values, *reads)
    torch.testing.assert_close(grad_weights, (values[reads[0]] * reads[2].unsqueeze(1)).sum(-1))
    check(gradient, dense([reads]) * gradient.row_filter.unsqueeze(1))


def test_borrowed_tensors_may_be_overwritten():
    gradient, values = RowGradient(20), torch.randn(20, 6)
    reads = draw(30, 4, 0)
    expected = dense([reads])
    gradient.take(values, *reads, borrowed=True)
    for tensor in reads:
        tensor.zero_()
    check(gradient, expected)


def test_the_sums_lie_in_the_same_storage_at_every_step():
    gradient, values = RowGradient(20, alone=True), torch.randn(20, 6)
    places = set()
    for seed in range(3):
        gradient.take(values, *draw(30, 4, seed))
        places.add(gradient.compact().sums.data_ptr())
        gradient.clear()
    assert len(places) == 1


def test_any_number_of_threads_gives_the_same_bits():
    values, threads, results = torch.randn(20, 6), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            gradient = RowGradient(20)
            for seed in range(3):
                gradient.take(values, *draw(2000, 4, seed))
            results.append((*gradient.compact()[:3], gradient.norm()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
