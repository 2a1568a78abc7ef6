"""Values of one byte an element: what is lost, and that reads are those of the dequantised table."""

import copy
import math

import pytest
import torch

from memlm.memory import EngramConfig, MemoryConfig, MemoryPool, PEERConfig
from memlm.memory.quantised import FORMATS, QuantisedPool, dequantise, held_as, quantise, use_quantised
from memlm.transformer import Transformer, TransformerConfig


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def values_of_many_sizes(slots, value_dim, dtype=torch.float32):
    return (torch.randn(slots, value_dim) * torch.logspace(-20, 20, slots).unsqueeze(1)).to(dtype)


def exact(codes, scales):
    return codes.to(torch.float64) * scales.double().unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("slots", "value_dim"), [(1, 1), (37, 5), (3000, 257), (9000, 513)])
def test_int8_is_off_by_half_a_step_at_most(slots, value_dim, dtype):
    values = values_of_many_sizes(slots, value_dim, dtype)
    before = values.clone()
    codes, scales = quantise(values, "int8")
    assert torch.equal(values, before)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert scales.shape == (slots,)
    assert int(codes.min()) >= -127
    assert torch.equal(codes.abs().amax(1), torch.full((slots,), 127, dtype=torch.int8))
    error = (values.double() - exact(codes, scales)).abs()
    assert (error <= scales.double().unsqueeze(1) * 0.50001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_off_by_a_sixteenth_at_most(dtype):
    values = values_of_many_sizes(3000, 257, dtype)
    before = values.clone()
    codes, scales = quantise(values, "fp8")
    assert torch.equal(values, before)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float().abs().amax(1), torch.full((3000,), 448.0))
    error = (values.double() - exact(codes, scales)).abs()
    # Three bits of mantissa; below 2^-6 of the code steps of 2^-9.
    bound = torch.maximum(values.double().abs() / 16, scales.double().unsqueeze(1) * 2**-10)
    assert (error <= bound * 1.0001).all()


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_rows_of_zeros_and_of_next_to_nothing_are_zero(format):
    values = torch.randn(5, 8)
    values[1] = 0
    values[3] = 1e-45
    codes, scales = quantise(values, format)
    assert scales[1] == 0
    restored = dequantise(codes, scales, torch.full((5, 8), math.nan))
    assert torch.equal(restored[1], torch.zeros(8))
    assert restored[3].abs().max() < 1e-40
    assert torch.allclose(restored[[0, 2, 4]], values[[0, 2, 4]], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_row_that_is_not_finite_is_named(format):
    values = torch.randn(20_000, 200)
    values[15_001, 3] = math.inf
    values[17_000, 3] = math.nan
    with pytest.raises(ValueError, match="row 15001 of the values holds NaN or infinity"):
        quantise(values, format)


def test_other_formats_have_no_scales():
    values = torch.randn(7, 3)
    same, scales = quantise(values, "float32")
    assert same is values
    assert scales is None
    half, scales = quantise(values, "bfloat16")
    assert torch.equal(half, values.bfloat16())
    assert scales is None
    with pytest.raises(ValueError, match=r"no format 'int4'.*float32, bfloat16, int8, fp8"):
        quantise(values, "int4")


def test_no_temporary_grows_with_the_table():
    """What quantising allocates beside its result, as the profiler counts it."""
    peaks = []
    for slots in (20_000, 80_000):
        values = torch.randn(slots, 256)
        with torch.profiler.profile(profile_memory=True) as profile:
            kept = quantise(values, "int8")
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak - sum(part.nbytes for part in kept))
    assert peaks[1] < 1.1 * peaks[0] + 2**20
    assert peaks[1] < 40 * 2**20 < 80_000 * 256 * 4


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("tokens", "reads", "value_dim"), [(1, 1, 1), (3, 7, 5), (130, 128, 33), (9, 4, 64), (0, 3, 4)]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_reads_and_dots_are_those_of_the_dequantised_table(format, tokens, reads, value_dim, dtype):
    pool = MemoryPool(101, value_dim)
    pool.initialise(1.0)
    with torch.no_grad():
        pool.values[17] = 0
    held = held_as(pool, format)
    assert isinstance(held, QuantisedPool)
    table = exact(held.values, held.scales)
    # Some rows often, as real reads do.
    slots = (torch.rand(tokens, reads) ** 3 * 101).to(dtype)
    weights, hidden = torch.randn(tokens, reads), torch.randn(tokens, value_dim)
    gathered = table[slots.long()]
    expected = torch.einsum("nl,nlv->nv", weights.double(), gathered)
    dots = torch.einsum("nv,nlv->nl", hidden.double(), gathered)
    read, dot = held.read(slots, weights), held.dot(slots, hidden)
    assert read.dtype == dot.dtype == torch.float32
    assert read.shape == (tokens, value_dim)
    torch.testing.assert_close(read.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dot.double(), dots, rtol=1e-5, atol=1e-5)
    half = held.read(slots, weights.bfloat16())
    torch.testing.assert_close(half.double(), expected, rtol=0.02, atol=0.05)


def test_every_fp8_number_is_read_right():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.float().isnan()].unsqueeze(1)
    held = QuantisedPool(len(codes), 1, "fp8")
    held.values, held.scales = codes, torch.ones(len(codes))
    slots = torch.arange(len(codes)).unsqueeze(1)
    assert torch.equal(held.read(slots, torch.ones(len(codes), 1)), codes.float())
    assert torch.equal(held.dot(slots, torch.ones(len(codes), 1)), codes.float())


def test_other_devices_calculate_the_same():
    """The plain operations that serve devices without kernels, run on the CPU."""
    from memlm.memory import quantised

    pool = MemoryPool(1000, 64)
    pool.initialise(1.0)
    slots, weights, hidden = torch.randint(1000, (700, 90)), torch.randn(700, 90), torch.randn(700, 64)
    for format in ("int8", "fp8"):
        held = held_as(pool, format)
        plain = quantised._weighted_read(held.values, held.scales, slots, weights)
        torch.testing.assert_close(plain, held.read(slots, weights), rtol=1e-4, atol=1e-4)
        plain = quantised._dots(held.values, held.scales, slots, hidden)
        torch.testing.assert_close(plain, held.dot(slots, hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_what_a_read_may_not_be_asked_for(format):
    pool = MemoryPool(10, 4)
    pool.initialise(1.0)
    held = held_as(pool, format)
    with pytest.raises(ValueError, match="from 0 to 9"):
        held.read(torch.tensor([[10]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="from 0 to 9"):
        held.dot(torch.tensor([[-1]]), torch.ones(1, 4))
    with pytest.raises(ValueError, match="one shape"):
        held.read(torch.tensor([[1]]), torch.ones(1, 2))


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_observers_see_the_reads(format):
    pool = MemoryPool(10, 4)
    pool.initialise(1.0)
    pool.observers.append(lambda slots, weights: seen.append((slots.tolist(), weights.tolist())))
    held = held_as(pool, format)
    seen: list = []
    held.read(torch.tensor([[3, 4]]), torch.tensor([[0.5, 2.0]]))
    held.dot(torch.tensor([[5]]), torch.ones(1, 4))
    assert seen == [([[3, 4]], [[0.5, 2.0]]), ([[5]], [[1.0]])]


CONFIG = TransformerConfig(dim=32, layers=2, heads=2, feed_forward_dim=48)
MEMORY = {"half_keys": 12, "heads": 2, "reads": 4, "key_dim": 8, "layers": [0, 1]}
MEMORIES = {
    "memory_plus": MemoryConfig(**MEMORY),
    "peer": PEERConfig(**MEMORY),
    "expanded": MemoryConfig(**MEMORY, value_expansion=4, values_dtype="bfloat16"),
    "engram": EngramConfig(slots=200, layers=[0, 1]),
}


def made(memory):
    return Transformer(50, CONFIG, MEMORIES[memory]).eval().requires_grad_(False)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_model_with_values_in_another_format_is_that_of_the_dequantised_values(format, memory):
    tokens = torch.randint(50, (2, 9))
    model = made(memory)
    held = copy.deepcopy(model)
    for name, pool in model.pools.items():
        held.pools[name] = held_as(pool, format)
        codes, scales = quantise(pool.values, format)
        values = codes if scales is None else exact(codes, scales).float()
        pool.values = torch.nn.Parameter(values, requires_grad=False)
    assert not any(parameter.requires_grad for parameter in held.parameters())
    torch.testing.assert_close(held(tokens), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_model_made_on_the_meta_device_takes_quantised_values(format, memory):
    tokens = torch.randint(50, (2, 9))
    model = made(memory)
    for name, pool in list(model.pools.items()):
        model.pools[name] = held_as(pool, format)
    state = model.state_dict()
    assert {f"pools.{name}.{part}" for name in model.pools for part in ("values", "scales")} <= set(state)
    with torch.device("meta"):
        empty = made(memory)
    use_quantised(empty, format)
    assert all(buffer.is_meta for pool in empty.pools.values() for buffer in pool.buffers())
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(tokens), model(tokens))
