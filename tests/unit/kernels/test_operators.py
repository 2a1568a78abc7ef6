"""The operators: schemas, fake kernels and gradients by opcheck, and whole graphs under torch.compile."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memlm.errors import ConfigError
from memlm.flops import read_flops
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


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_dot(kernels, dtype):
    pool, slots, _ = pool_and_reads(kernels, dtype)
    hidden = torch.randn(7, 6, requires_grad=True)
    torch.library.opcheck(operators.dot, (pool.values, slots, hidden, kernels, pool.gradient.number, False))
    arguments = (pool.values.detach(), slots, hidden.detach(), torch.randn(7, 5), kernels)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(operators.dot_backward, (*arguments, pool.gradient.number, *needs, False))


def test_gradcheck_of_read_dot_and_search_in_float64():
    pool, slots, weights = pool_and_reads("reference", torch.float64)
    weights = weights.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: pool.read(slots, w), weights)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: pool.dot(slots, h), hidden)
    query = torch.randn(6, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: operators.search(q, k, 4, 3, "cpu")[0], (query, keys))


@KERNELS
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"query_norm": "qk", "value_expansion": 2}, {"pre_values": "gelu"}], ids=str
)
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(kernels, alone, options):
    torch._dynamo.reset()  # or all these layers count as recompilations of one
    torch.manual_seed(0)
    config = MemoryConfig(half_keys=8, heads=2, reads=4, kernels=kernels, layers=[0], **options)
    pools = torch.nn.ModuleList(config.build(16, 1)[0].values())
    layer = MemoryLayer(config, 16)
    with torch.no_grad():
        for parameter in [*layer.parameters(), *pools.parameters()]:
            parameter.normal_(std=0.3)
    for pool in pools:
        pool.gradient.alone = alone
    twin, twin_pools = copy.deepcopy((layer, pools))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        hidden = torch.randn(batch, 4, 16, requires_grad=True)
        outputs, grads = [], []
        for module, tables in ((compiled, pools), (twin, twin_pools)):
            output = module(hidden, list(tables))
            hidden.grad = None
            output.square().sum().backward()
            outputs.append(output.detach())
            grads.append(hidden.grad)
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*grads)
    for parameter, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    for pool, twin_pool in zip(pools, twin_pools, strict=True):
        found, expected = pool.gradient.compact(), twin_pool.gradient.compact()
        assert torch.equal(found.rows, expected.rows)
        torch.testing.assert_close(found.sums, expected.sums)
        assert pool.values.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("pre_values", ["none", "gelu"])
def test_inductor_does_not_overwrite_what_the_pools_keep(pre_values):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = MemoryConfig(half_keys=8, heads=2, reads=4, pre_values=pre_values, layers=[0, 1, 2])
    pools, placed = config.build(16, 3)
    layers = torch.nn.ModuleList(placed[block].layer for block in range(3))
    with torch.no_grad():
        for module in (*layers, *pools.values()):
            for parameter in module.parameters():
                parameter.normal_(std=0.3)

    def run(hidden):
        for layer in layers:
            hidden = hidden + layer(hidden, list(pools.values())).relu()
        return hidden.square().sum()

    hidden = torch.randn(3, 4, 16, requires_grad=True)
    run(hidden).backward()
    expected = []
    for pool in pools.values():
        compact = pool.gradient.compact()
        expected.append((compact.rows.clone(), compact.sums.clone()))
        pool.gradient.clear()
    torch.compile(run, fullgraph=True)(hidden).backward()
    for pool, (rows, sums) in zip(pools.values(), expected, strict=True):
        found = pool.gradient.compact()
        assert torch.equal(found.rows, rows)
        torch.testing.assert_close(found.sums, sums)


@pytest.mark.parametrize("operation", ["read", "dot"])
def test_what_is_compiled_with_fixed_factors_still_has_a_gradient(operation):
    pool, slots, weights = pool_and_reads("cpu")
    factors = weights.detach() if operation == "read" else torch.randn(7, 6)
    torch.compile(getattr(pool, operation), backend="aot_eager")(slots, factors).sum().backward()
    assert pool.gradient.compact() is not None


def test_frozen_values_have_no_gradient_but_their_factors_do():
    pool, slots, weights = pool_and_reads("cpu")
    pool.values.requires_grad_(False)
    pool.read(slots, weights).sum().backward()
    torch.testing.assert_close(weights.grad, pool.values[slots.long()].sum(-1))
    hidden = torch.randn(7, 6, requires_grad=True)
    pool.dot(slots, hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, pool.values[slots.long()].sum(1))
    assert pool.gradient.compact() is None


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


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda s, h: (s + 40, h),
            r"slots of a dot must be from 0 to 39, the table's last; they go from 4\d",
        ),
        (lambda s, h: (s - 1 - s.max(), h), "from 0 to 39"),
        (lambda s, h: (s, h / 0), "hidden states of a dot are not all finite"),
        (
            lambda s, h: (s, h[:, :3]),
            r"slots \[tokens, reads\] and hidden states \[tokens, 6\], not \(7, 5\)",
        ),
        (lambda s, h: (s[:3], h), r"not \(3, 5\) and \(7, 6\)"),
        (lambda s, h: (s[0], h), r"not \(5,\) and \(7, 6\)"),
        (lambda s, h: (s.float(), h), "slots of a dot must be int32 or int64, not torch.float32"),
        (lambda s, h: (s, h.int()), "hidden states of a dot must be floating point, not torch.int32"),
        (lambda s, h: (s, h.to("meta")), "on one device, not cpu, cpu and meta"),
    ],
)
def test_bad_dots_are_refused(change, message):
    pool, slots, _ = pool_and_reads("cpu")
    with pytest.raises(ValueError, match=message):
        pool.dot(*change(slots, torch.randn(7, 6)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "none", "projection": False},
        {"value_dim": 20, "query_norm": "qk", "half_keys": (8, 12)},
        {"query_norm": "batch", "value_expansion": 4},
        {"pre_values": "silu", "value_dim": 24},
    ],
    ids=str,
)
def test_torch_counts_the_flops_that_a_layer_reports(options):
    config = MemoryConfig(**{"half_keys": 12, "heads": 3, "reads": 5, "key_dim": 8, "layers": [0], **options})
    config.validate(32, 1)
    pools, placed = config.build(32, 1)
    layer, tables = placed[0].layer, list(pools.values())
    for module in (layer, *tables):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    expected = layer.flops(16)
    for table in tables:
        expected += read_flops(layer.rows_read, table.value_dim)
    hidden = torch.randn(2, 16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = layer(hidden, tables)
    assert counter.get_total_flops() / 32 == pytest.approx(expected.forward, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() / 32 == pytest.approx(expected.backward, rel=0.02)


def test_flops_of_the_operators_by_hand():
    """35 reads of 6 elements; 9 queries of 2 heads, 19 half keys of 4 elements each, 90 pairs selected."""
    pool, slots, weights = pool_and_reads("cpu")
    hidden = torch.randn(7, 6, requires_grad=True)
    query = torch.randn(9, 2, 2, 4, requires_grad=True)
    keys = torch.randn(2, 19, 4, requires_grad=True)

    def counted(run) -> tuple[dict, object]:
        with FlopCounterMode(display=False) as counter:
            result = run()
        return {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}, result

    def forward():
        return (
            pool.read(slots, weights),
            pool.dot(slots, hidden),
            operators.search(query, keys, 7, 5, "cpu")[0],
        )

    counts, outputs = counted(forward)
    assert counts == {"memlm.read": 420, "memlm.dot": 420, "memlm.search": 2 * 9 * 2 * 19 * 4}
    counts, _ = counted(lambda: torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs]))
    backward = {"memlm.read_backward": 840, "memlm.dot_backward": 840}
    assert counts == {**backward, "memlm.search_backward": 2 * 2 * 2 * 90 * 4}
    pool.values.requires_grad_(False)
    counts, _ = counted(lambda: pool.dot(slots, hidden).sum().backward())
    assert counts == {"memlm.dot": 420, "memlm.dot_backward": 420}
