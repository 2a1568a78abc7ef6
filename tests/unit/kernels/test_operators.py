"""The operators: schemas, fake kernels and gradients by opcheck, and whole graphs under torch.compile."""

import copy

import pytest
import torch

from memlm.errors import ConfigError
from memlm.kernels import cpu, operators, reference
from memlm.kernels.backend import ENVIRONMENT, select
from memlm.memory import MemoryConfig, MemoryLayer, MemoryPool

KERNELS = pytest.mark.parametrize("kernels", ["reference", "cpu"])


def pool_and_reads(kernels: str, dtype=torch.float32, alone=False):
    generator = torch.Generator().manual_seed(0)
    pool = MemoryPool(40, 6, dtype, kernels, alone)
    with torch.no_grad():
        pool.values.copy_(torch.randn(40, 6, generator=generator))
    slots = torch.randint(40, (7, 5), generator=generator, dtype=torch.int32)
    weights = torch.rand(7, 5, generator=generator).requires_grad_()
    return pool, slots, weights


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_read(kernels, dtype):
    pool, slots, weights = pool_and_reads(kernels, dtype)
    torch.library.opcheck(operators.read, (pool.values, slots, weights, kernels, pool.gradient.number, False))
    grad = torch.randn(7, 6, dtype=dtype)
    arguments = (pool.values.detach(), slots, weights.detach(), grad, kernels, pool.gradient.number)
    torch.library.opcheck(operators.read_backward, (*arguments, True, True, False))
    torch.library.opcheck(operators.read_backward, (*arguments, False, True, False))


@KERNELS
def test_opcheck_of_the_search(kernels):
    query = torch.randn(9, 2, 2, 4, requires_grad=True)
    keys = torch.randn(2, 7 + 12, 4, requires_grad=True)
    torch.library.opcheck(operators.search, (query, keys, 7, 5, kernels))
    scores, slots = operators.search(query, keys, 7, 5, kernels)
    arguments = (query.detach(), keys.detach(), slots, torch.randn_like(scores), 7, kernels)
    torch.library.opcheck(operators.search_backward, arguments)


def test_gradcheck_of_read_and_search_in_float64():
    pool, slots, weights = pool_and_reads("reference", torch.float64)
    weights = weights.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: pool.read(slots, w), weights)
    query = torch.randn(6, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: operators.search(q, k, 4, 3, "cpu")[0], (query, keys))


@KERNELS
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("query_norm", ["none", "qk"])
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(kernels, alone, query_norm):
    torch.manual_seed(0)
    config = MemoryConfig(half_keys=8, heads=2, reads=4, kernels=kernels, query_norm=query_norm)
    layer, pool = MemoryLayer(config, 16), MemoryPool(64, 16, kernels=kernels, alone=alone)
    with torch.no_grad():
        for parameter in [*layer.parameters(), *pool.parameters()]:
            parameter.normal_(std=0.3)
    twin, twin_pool = copy.deepcopy((layer, pool))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        hidden = torch.randn(batch, 4, 16)
        outputs = []
        for module, table in ((compiled, pool), (twin, twin_pool)):
            output = module(hidden, table)
            output.square().sum().backward()
            outputs.append(output.detach())
        torch.testing.assert_close(*outputs)
    for parameter, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    found, expected = pool.gradient.compact(), twin_pool.gradient.compact()
    assert torch.equal(found.rows, expected.rows)
    torch.testing.assert_close(found.sums, expected.sums)
    assert pool.values.grad is None


@pytest.mark.slow
def test_inductor_does_not_overwrite_what_the_pool_keeps():
    torch.manual_seed(0)
    config = MemoryConfig(half_keys=8, heads=2, reads=4)
    layers = torch.nn.ModuleList(MemoryLayer(config, 16) for _ in range(3))
    pool = MemoryPool(64, 16)
    with torch.no_grad():
        for parameter in [*layers.parameters(), *pool.parameters()]:
            parameter.normal_(std=0.3)

    def run(hidden):
        for layer in layers:
            hidden = hidden + layer(hidden, pool).relu()
        return hidden.square().sum()

    hidden = torch.randn(3, 4, 16)
    run(hidden).backward()
    expected = pool.gradient.compact()
    rows, sums = expected.rows.clone(), expected.sums.clone()
    pool.gradient.clear()
    torch.compile(run, fullgraph=True)(hidden).backward()
    found = pool.gradient.compact()
    assert torch.equal(found.rows, rows)
    torch.testing.assert_close(found.sums, sums)


def test_a_compiled_read_with_fixed_weights_still_has_a_gradient():
    pool, slots, weights = pool_and_reads("cpu")
    torch.compile(pool.read, backend="aot_eager")(slots, weights.detach()).sum().backward()
    assert pool.gradient.compact() is not None


def test_frozen_values_have_no_gradient_but_their_weights_do():
    pool, slots, weights = pool_and_reads("cpu")
    pool.values.requires_grad_(False)
    pool.read(slots, weights).sum().backward()
    assert pool.gradient.compact() is None
    torch.testing.assert_close(weights.grad, pool.values[slots.long()].sum(-1))


def test_backends_are_chosen_by_device_option_and_environment(monkeypatch):
    assert select("cpu") is cpu and select("meta") is reference
    assert select("cpu", "reference") is reference
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert select("cpu", "cpu") is reference
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(ConfigError, match="environment variable MEMLM_KERNELS: is 'fast', must be one of"):
        select("cpu")
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"model\.memory\.kernels: is triton, which needs a CUDA device"):
        select("cpu", "triton")
    with pytest.raises(ConfigError, match=r"model\.memory\.kernels: is cpu, but the model is on cuda"):
        select("cuda", "cpu")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s, w: (s + 40, w), r"from 0 to 39, the table's last; they go from 4\d to 7\d"),
        (lambda s, w: (s - 1 - s.max(), w), "from 0 to 39"),
        (lambda s, w: (s, w * float("nan")), "not all finite"),
        (lambda s, w: (s, w[:, :3]), r"one shape \[tokens, reads\], not \(7, 5\) and \(7, 3\)"),
        (lambda s, w: (s.float(), w), "must be int32 or int64, not torch.float32"),
        (lambda s, w: (s, s), "must be floating point, not torch.int32"),
        (lambda s, w: (s.to("meta"), w), "on one device, not cpu, meta and cpu"),
    ],
)
def test_bad_reads_are_refused(change, message):
    pool, slots, weights = pool_and_reads("cpu")
    with pytest.raises(ValueError, match=message):
        pool.read(*change(slots, weights))
