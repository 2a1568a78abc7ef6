"""Memory layers with pre-values (PEER) and virtual tables, against a brute-force twin in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from memory_oracle import DIM, build, check_against_brute_force, dense_gradient

from memlm.errors import ConfigError
from memlm.memory import MemoryConfig, MemoryPool, PEERConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]
PRE_VALUES = ["identity", "relu", "silu", "gelu"]

needs_float64 = pytest.mark.skipif(INTERPRETED, reason="not of Triton's kernels")


@needs_float64
@pytest.mark.parametrize("pre_values", PRE_VALUES)
@pytest.mark.parametrize(
    "options",
    [
        {"gate": "none", "projection": False, "query_norm": "batch"},
        {"value_dim": 9},
        {"gate": "none", "value_dim": 3, "heads": 1, "query_norm": "qk"},
        {"projection": False, "half_keys": (5, 9), "heads": 3},
    ],
    ids=str,
)
def test_output_and_all_gradients_equal_the_brute_force_layer(pre_values, options):
    check_against_brute_force(*build(pre_values=pre_values, **options), pre_values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"pre_values": "gelu", "gate": "none", "projection": False, "query_norm": "batch"},
        {"pre_values": "relu", "value_dim": 9, "heads": 1},
        {"pre_values": "silu", "value_dim": 4, "value_expansion": 7},
    ],
    ids=str,
)
def test_every_backend_gives_the_brute_force_layer_in_fp32(backend, options):
    layers, pools = build(torch.float32, seed=3, kernels=backend, **options)
    pre_values = options.get("pre_values", "none")
    tokens = (1, 3) if INTERPRETED else (3, 5)  # the interpreter is slow
    check_against_brute_force(layers, pools, pre_values, tolerance=1e-4, tokens=tokens)


@needs_float64
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bf16_tables(backend):
    options = {"pre_values": "gelu", "value_dim": 9, "kernels": backend}
    layers, pools = build(torch.float32, table_dtype=torch.bfloat16, **options)
    check_against_brute_force(layers, pools, "gelu", tolerance=2**-6)
    assert pools[0].gradient.compact().sums.dtype == torch.float32


@needs_float64
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    first, second = draw(2, 9), draw(2, 9)
    tables = [count for count in range(1, 8) if first * second % count == 0][-draw(1, 2) :][0]
    options = {
        "half_keys": (first, second), "heads": draw(1, 4), "reads": draw(1, min(first, second)),
        "key_dim": 2 * draw(1, 5), "value_dim": draw(1, 20), "value_expansion": tables,
        "gate": ["silu", "none"][draw(0, 1)], "pre_values": PRE_VALUES[draw(0, 3)],
    }  # fmt: skip
    layers, pools = build(seed=seed, **options)
    assert [pool.slots for pool in pools] == [first * second // tables] * 2
    check_against_brute_force(layers, pools, options["pre_values"], tokens=(draw(1, 3), draw(1, 6)))


@needs_float64
def test_layers_and_micro_batches_share_both_pools_and_repeat_rows():
    layers, pools = build(layers=2, pre_values="silu", value_dim=5)
    check_against_brute_force(layers, pools, "silu", micro_batches=2)
    check_against_brute_force(*build(pre_values="silu", value_dim=4), "silu", skewed=True, tolerance=1e-9)


@needs_float64
@pytest.mark.parametrize("count", [1, 7, 49])
def test_expanded_values_equal_the_brute_force_layer(count):
    check_against_brute_force(*build(value_expansion=count, value_dim=3, query_norm="qk"))


# -- the dot by itself


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dot_and_read_of_one_pool_against_dense_autograd(backend, alone, filtered, dtype):
    """Duplicates in a token and among tokens; two dots and a read add to one gradient."""
    generator = torch.Generator().manual_seed(1)
    pool = MemoryPool(30, 5, dtype, backend, alone)
    pool.values.data = torch.randn(30, 5, generator=generator).to(dtype)
    table = pool.values.detach().double().requires_grad_()
    keep = torch.arange(30) % 3 > 0
    if filtered:
        pool.gradient.row_filter = keep
    total = expected_total = 0.0
    for _ in range(2):
        slots = torch.randint(6, (9, 4), generator=generator, dtype=torch.int32)
        hidden = torch.randn(9, 5, generator=generator).requires_grad_()
        twin = hidden.detach().double().requires_grad_()
        weight = torch.randn(9, 4, generator=generator)
        dot = pool.dot(slots, hidden)
        expected = torch.einsum("nlv,nv->nl", table[slots.long()], twin)
        assert dot.dtype == torch.float32
        torch.testing.assert_close(dot.double(), expected, rtol=1e-5, atol=1e-5)
        total = total + (dot * weight).sum()
        expected_total = expected_total + (expected * weight.double()).sum()
        inputs = hidden, twin
    total = total + pool.read(slots, dot).float().square().sum()
    expected_total = expected_total + torch.einsum("nl,nlv->nv", expected, table[slots.long()]).square().sum()
    total.backward()
    expected_total.backward()
    loose = {"rtol": 2**-6, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(inputs[0].grad.double(), inputs[1].grad, **loose)
    expected_grad = table.grad * keep.unsqueeze(1) if filtered else table.grad
    torch.testing.assert_close(dense_gradient(pool), expected_grad, **loose)
    touched = {0, 1, 2, 3, 4, 5} & set(keep.nonzero().flatten().tolist() if filtered else range(30))
    assert set(pool.gradient.compact().rows.tolist()[: len(touched)]) == touched


def test_observers_see_the_rows_of_a_dot_with_weights_of_one():
    pool, seen = MemoryPool(10, 3), []
    torch.nn.init.ones_(pool.values)
    pool.observers.append(lambda slots, weights: seen.append((slots, weights)))
    pool.dot(torch.tensor([[1, 9], [2, 2]]), torch.ones(2, 3))
    ((slots, weights),) = seen
    assert slots.tolist() == [[1, 9], [2, 2]]
    assert weights.tolist() == [[1, 1], [1, 1]]


def test_no_tokens_and_no_reads():
    pool = MemoryPool(10, 3)
    torch.nn.init.ones_(pool.values)
    for shape in ((0, 4), (3, 0)):
        hidden = torch.ones(shape[0], 3, requires_grad=True)
        dot = pool.dot(torch.zeros(shape, dtype=torch.int32), hidden)
        assert dot.shape == shape
        dot.sum().backward()
        assert not hidden.grad.any()


# -- options


def test_pools_of_layers_and_their_pre_values():
    config = MemoryConfig(
        half_keys=4, reads=2, key_dim=4, value_dim=5, layers=[0, 1, 3], layer_pools=["a", "b", "b"],
        pre_values="relu", values_dtype="bfloat16",
    )  # fmt: skip
    config.validate(DIM, 4)
    pools, placed = config.build(DIM, 4)
    assert {name: tuple(pool.values.shape) for name, pool in pools.items()} == {
        "a": (16, 5), "b": (16, 5), "a_down": (16, 6), "b_down": (16, 6)
    }  # fmt: skip
    assert all(pool.values.dtype == torch.bfloat16 for pool in pools.values())
    assert {name: pool.gradient.alone for name, pool in pools.items()} == {
        "a": True, "b": False, "a_down": True, "b_down": False
    }  # fmt: skip
    assert {block: where.pools for block, where in placed.items()} == {
        0: ("a", "a_down"), 1: ("b", "b_down"), 3: ("b", "b_down")
    }  # fmt: skip


def test_peer_s_defaults_are_those_of_the_paper_s_comparison():
    config = PEERConfig()
    config.validate(768, 12)
    assert (config.slots, config.heads, config.reads, config.count) == (589_824, 4, 32, 1)
    assert (config.gate, config.projection, config.pre_values, config.query_norm) == (
        "none", False, "gelu", "batch"
    )  # fmt: skip
    assert config.resolved_key_dim(768) == 256


def test_every_option_of_peer_is_documented():
    import inspect

    source = inspect.getsource(PEERConfig)
    for name in PEERConfig.__annotations__:
        assert f"    {name}: " in source
        assert source.partition(f"    {name}: ")[2].split("\n")[1].strip().startswith('"""')


@pytest.mark.parametrize(
    "options,key,parts",
    [
        ({"pre_values": "relu", "layer_pools": ["a", "a_down", "b"]}, "layer_pools", ["'a_down'", "'a'"]),
        ({"value_expansion": 0}, "value_expansion", ["0", "1,048,576"]),
        ({"value_expansion": 3}, "value_expansion", ["3", "1,048,576", "divide"]),
        ({"value_expansion": 2, "projection": False}, "value_expansion", ["2", "projection: true"]),
    ],
)
def test_errors_name_key_and_values(options, key, parts):
    with pytest.raises(ConfigError) as error:
        MemoryConfig(**options).validate(dim=64, depth=12)
    assert error.value.key == f"model.memory.{key}"
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_without_pre_values_a_pool_may_have_any_name():
    MemoryConfig(layer_pools=["a", "a_down", "b"]).validate(dim=64, depth=12)


# -- before training


@pytest.mark.parametrize(
    "pre_values,size", [("identity", 1), ("relu", 0.5), ("silu", 0.3557), ("gelu", 0.4252)]
)
@pytest.mark.parametrize("heads,reads", [(4, 32), (8, 16), (1, 32)])
def test_the_size_of_the_first_output(pre_values, size, heads, reads):
    """``sqrt(mean of act(normal)^2 * heads / reads / V)``: dots have a std of 1, and weights are even."""
    torch.manual_seed(0)
    config = PEERConfig(half_keys=64, key_dim=32, heads=heads, reads=reads, layers=[0], pre_values=pre_values)
    pools, placed = config.build(96, 1)
    layer = placed[0].layer
    with torch.no_grad():
        for module in (layer, *pools.values()):
            module.initialise(1.0)
        hidden = F.rms_norm(torch.randn(1, 500, 96), (96,))
        output = layer(hidden, list(pools.values()))
        dots = pools["main_down"].dot(layer.address(hidden[0])[0].flatten(1), hidden[0])
    assert dots.std() == pytest.approx(1, rel=0.05)
    assert output.std() == pytest.approx((size * heads / reads / 96) ** 0.5, rel=0.15)


def test_start_at_zero_zeroes_the_values_and_not_the_pre_values():
    config = PEERConfig(half_keys=8, heads=2, reads=4, key_dim=4, layers=[0], start_at_zero=True)
    pools, placed = config.build(DIM, 1)
    with torch.no_grad():
        for module in (placed[0].layer, *pools.values()):
            module.initialise(1.0)
    hidden = torch.randn(2, 5, DIM)
    output = placed[0].layer(hidden, list(pools.values()))
    assert not output.any()
    output.backward(hidden)
    assert pools["main"].gradient.norm() > 0  # so that it does not stay there


@pytest.mark.skipif(INTERPRETED, reason="is what this runs")
def test_the_same_with_triton_s_kernels_under_its_interpreter():
    """In a process of its own: whether kernels are interpreted is settled when triton is imported."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "11 passed" in run.stdout
