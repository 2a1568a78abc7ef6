"""Counts against torch's flop counter, against hand computation, and against the paper's totals."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memlm.flops import count
from memlm.memory import MemoryConfig
from memlm.transformer import Transformer, TransformerConfig

MEMORY = {"half_keys": 12, "heads": 3, "reads": 5, "key_dim": 8, "layers": [0, 2]}


def measured_flops(model: Transformer, sequence_length: int) -> float:
    """Forward FLOPs a token as torch counts them; it does not see the weighted read."""
    tokens = torch.zeros(2, sequence_length, dtype=torch.int64)
    # As matrix products: the counter does not know the fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens)
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 32, "layers": 2, "heads": 4},
        {"dim": 48, "layers": 3, "heads": 6, "kv_heads": 2, "feed_forward_dim": 70},
        {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "tie_embeddings": True},
    ],
)
@pytest.mark.parametrize("sequence_length", [8, 50])
def test_dense_flops_equal_torch_s_counter(options, sequence_length):
    model = Transformer(37, TransformerConfig(**options))
    counts = count(model, sequence_length)
    assert counts.flops_per_token == pytest.approx(measured_flops(model, sequence_length), rel=0.02)
    assert (counts.memory, counts.values_read_per_token, counts.bytes_read_per_token) == (0, 0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "none", "projection": False},
        {"value_dim": 20, "query_norm": "qk"},
        {"query_norm": "batch"},
    ],
)
def test_memory_flops_equal_torch_s_counter_and_the_read(options):
    model = Transformer(37, TransformerConfig(dim=32, layers=3, heads=4), MemoryConfig(**MEMORY, **options))
    counts = count(model, 16)
    read = 2 * counts.values_read_per_token * options.get("value_dim", 32)
    assert counts.flops_per_token - read == pytest.approx(measured_flops(model, 16), rel=0.02)


@pytest.mark.parametrize("tie", [False, True])
def test_counts_by_hand(tie):
    config = TransformerConfig(dim=32, layers=3, heads=4, kv_heads=2, feed_forward_dim=40, tie_embeddings=tie)
    model = Transformer(37, config, MemoryConfig(**MEMORY, value_dim=20)).bfloat16()
    counts = count(model, 10)
    attention = 32 * 32 * 2 + 2 * 32 * 16
    memory_layer = (32 * 24 + 24) + 3 * 2 * 12 * 4 + (32 * 20 + 20) + (20 * 32 + 32)
    rest = 3 * (attention + 2 * 32) + 2 * memory_layer + 3 * 32 * 40 + 32
    assert counts.memory == 144 * 20
    assert counts.total == rest + 37 * 32 * (1 if tie else 2) + counts.memory
    assert counts.values_read_per_token == 2 * 3 * 5
    assert counts.bytes_read_per_token == 30 * 20 * 2
    # Of the embedding one row, unless the output layer uses all of it; of the pool the rows read.
    assert counts.active == rest + 37 * 32 + (0 if tie else 32) + 30 * 20
    products = 3 * attention + 2 * (32 * 24 + 3 * 2 * 12 * 4 + 2 * 32 * 20) + 3 * 32 * 40 + 37 * 32
    assert counts.flops_per_token == 2 * (products + 3 * 2 * 10 * 32 + 30 * 20)
    assert counts.as_dict()["total"] == counts.total


LADDER = {"134m": (768, 12, 12), "373m": (1024, 24, 16), "1.3b": (2048, 22, 32)}
PRINTED = 6e-4  # the last of three or four digits, rounded or cut
PLUS = {"134m": 4, "373m": 8, "1.3b": 8}


def total(base: str, memory: MemoryConfig | None) -> int:
    dim, layers, heads = LADDER[base]
    with torch.device("meta"):
        model = Transformer(32_000, TransformerConfig(dim=dim, layers=layers, heads=heads), memory)
    return count(model, 4096).total


@pytest.mark.parametrize("base,printed", [("134m", 134.1e6), ("373m", 373.8e6), ("1.3b", 1.261e9)])
def test_totals_of_the_dense_ladder(base, printed):
    assert total(base, None) == pytest.approx(printed, rel=PRINTED)


@pytest.mark.parametrize(
    "base,half_keys,printed",
    [("134m", 1024, 0.937e9), ("373m", 1024, 1.440e9), ("1.3b", 1024, 3.368e9), ("1.3b", 8192, 138.748e9)],
)
def test_totals_of_memory_plus(base, half_keys, printed):
    assert total(base, MemoryConfig(half_keys=half_keys, stride=PLUS[base])) == pytest.approx(
        printed, rel=PRINTED
    )


@pytest.mark.parametrize("base,printed", [("134m", 0.937e9), ("373m", 1.441e9), ("1.3b", 3.377e9)])
def test_totals_of_vanilla_memory(base, printed):
    vanilla = MemoryConfig(count=1, key_dim=256, gate="none", projection=False)
    assert total(base, vanilla) == pytest.approx(printed, rel=PRINTED)


def test_an_unknown_feed_forward_is_not_counted_as_nothing():
    model = Transformer(37, TransformerConfig(dim=32, layers=1, heads=4))
    model.blocks[0].feed_forward = torch.nn.Linear(32, 32)
    with pytest.raises(TypeError, match="Linear"):
        count(model, 8)
