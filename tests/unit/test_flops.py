"""Counts against torch's flop counter, against hand computation, and against the paper's totals."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memlm.flops import count, parts
from memlm.memory import MemoryConfig, PEERConfig
from memlm.memory.engram import EngramConfig
from memlm.transformer import MoEConfig, Transformer, TransformerConfig

BASE = {"dim": 32, "layers": 3, "heads": 4, "feed_forward_dim": 64}
MEMORY = {"half_keys": 12, "heads": 3, "reads": 5, "key_dim": 8, "layers": [0, 2]}
PLAIN = {"gate": "none", "projection": False}
FOUR = {"experts": 4}


def model_of(transformer=None, memory=None, moe=None) -> Transformer:
    return Transformer(37, TransformerConfig(**BASE | (transformer or {})), memory, moe)


def measured_flops(model: Transformer, sequence_length: int) -> tuple[float, float]:
    """FLOPs a token of the forward pass of a training step, and of the whole step, as torch counts them."""
    torch.manual_seed(0)
    tokens = torch.randint(37, (4, sequence_length))
    # As matrix products: the counter does not know the fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(model.train()(tokens).flatten(0, 1), tokens.flatten())
        forward = counter.get_total_flops()
        loss.backward()
    return forward / tokens.numel(), counter.get_total_flops() / tokens.numel()


MODELS = {
    "dense": lambda: model_of(),
    "grouped-query attention": lambda: model_of({"heads": 8, "kv_heads": 2, "head_dim": 6}),
    "one key head, tied": lambda: model_of({"kv_heads": 1, "tie_embeddings": True, "layers": 1}),
    "expert choice": lambda: model_of(moe=MoEConfig(**FOUR)),
    "expert choice of two": lambda: model_of(moe=MoEConfig(**FOUR, top_k=2, expert_dim=24, layers=[1])),
    "token choice": lambda: model_of(
        moe=MoEConfig(**FOUR, routing="token_choice", top_k=3, shared_experts=2)
    ),
    "Memory": lambda: model_of(memory=MemoryConfig(**MEMORY, **PLAIN)),
    "Memory, batch norm": lambda: model_of(memory=MemoryConfig(**MEMORY, **PLAIN, query_norm="batch")),
    "Memory+": lambda: model_of(memory=MemoryConfig(**MEMORY)),
    "Memory+, qk norm": lambda: model_of(memory=MemoryConfig(**MEMORY, value_dim=20, query_norm="qk")),
    "Memory+, rectangular": lambda: model_of(memory=MemoryConfig(**MEMORY | {"half_keys": (6, 40)})),
    "Memory+ over expanded values": lambda: model_of(memory=MemoryConfig(**MEMORY, value_expansion=4)),
    "beside": lambda: model_of(memory=MemoryConfig(**MEMORY, mode="beside")),
    "beside experts": lambda: model_of(memory=MemoryConfig(**MEMORY, mode="beside"), moe=MoEConfig(**FOUR)),
    "PEER": lambda: model_of(memory=PEERConfig(**MEMORY)),
    "PEER, projected": lambda: model_of(memory=PEERConfig(**MEMORY, value_dim=20, projection=True)),
    "Engram": lambda: model_of(memory=EngramConfig(slots=200, layers=[1, 2])),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("sequence_length", [8, 52])
def test_flops_of_a_training_step_equal_torch_s_counter(build, sequence_length):
    model = build()
    counts = count(model, sequence_length)
    forward, step = measured_flops(model, sequence_length)
    assert counts.flops_per_token == pytest.approx(forward, rel=1e-6)
    # Engram's rows are not weighted: counted is a gradient for their weights, which nobody asks for.
    rel = 0.02 if build is MODELS["Engram"] else 1e-6
    assert counts.flops_per_token + counts.backward_flops_per_token == pytest.approx(step, rel=rel)


def test_the_counter_sees_the_operators_of_the_memory():
    """The test above would say nothing of them if it did not."""
    model = model_of(memory=PEERConfig(**MEMORY))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    seen = {str(operator) for operator in counter.get_flop_counts()["Global"]}
    for name in ("search", "read", "dot"):
        assert {f"memlm.{name}", f"memlm.{name}_backward"} <= seen


def test_experts_that_choose_round_up():
    """Of 3 tokens 4 experts take one each: a third more than a token's share, which is what is counted."""
    model = model_of({"layers": 1}, moe=MoEConfig(**FOUR))
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(tokens)
    expert = 2 * 3 * 32 * 64
    assert counter.get_total_flops() == 3 * count(model, 3).flops_per_token + expert


@pytest.mark.parametrize("tie", [False, True])
def test_counts_by_hand(tie):
    config = TransformerConfig(dim=32, layers=3, heads=4, kv_heads=2, feed_forward_dim=40, tie_embeddings=tie)
    model = Transformer(37, config, MemoryConfig(**MEMORY, value_dim=20)).bfloat16()
    counts = count(model, 10)
    attention = 32 * 32 * 2 + 2 * 32 * 16
    memory_layer = (32 * 24 + 24) + 3 * 2 * 12 * 4 + (32 * 20 + 20) + (20 * 32 + 32)
    rest = 3 * (attention + 2 * 32) + 2 * memory_layer + 3 * 32 * 40 + 32
    assert counts.memory == 144 * 20
    assert counts.embedding == 37 * 32 * (1 if tie else 2)
    assert counts.total == rest + counts.embedding + counts.memory
    assert counts.values_read_per_token == 2 * 3 * 5
    assert counts.bytes_read_per_token == 30 * 20 * 2
    # Of the embedding one row, unless the output layer uses all of it; of the pool the rows read.
    assert counts.active == rest + 37 * 32 + (0 if tie else 32) + 30 * 20
    weights = 3 * attention + 2 * (32 * 24 + 2 * 32 * 20) + 3 * 32 * 40 + 37 * 32
    keys = 2 * 3 * 2 * 12 * 4
    assert counts.flops_per_token == 2 * (weights + keys + 3 * 2 * 10 * 32 + 30 * 20)
    selected_keys = 2 * 3 * 5 * 2 * 4
    assert counts.backward_flops_per_token == 4 * (weights + selected_keys + 3 * 2 * 10 * 32 + 30 * 20)
    assert counts.as_dict()["total"] == counts.total


def test_active_parameters_of_experts_by_hand():
    moe = MoEConfig(experts=6, routing="token_choice", top_k=2, shared_experts=1, expert_dim=16)
    model = model_of({"layers": 1}, moe=moe)
    attention, expert = 4 * 32 * 32, 3 * 32 * 16
    active = attention + 32 * 6 + 3 * expert + 3 * 32 + 37 * 32 + 32
    counts = count(model, 8)
    assert counts.active == active
    assert counts.total == active + 4 * expert + 36 * 32


def test_a_dense_model_reads_no_values():
    counts = count(model_of(), 8)
    assert (counts.memory, counts.values_read_per_token, counts.bytes_read_per_token) == (0, 0, 0)


def test_two_pools_and_two_layers_of_one():
    """Rows are counted for every layer that reads them, parameters once for a pool."""
    memory = MemoryConfig(**MEMORY | {"layers": [0, 1, 2]}, layer_pools=["a", "b", "a"], value_dim=20)
    model = model_of(memory=memory)
    counts = count(model, 8)
    assert counts.memory == 2 * 144 * 20
    assert counts.values_read_per_token == 3 * 15
    assert {name: size for name, size in parts(model).items() if "values" in name} == {
        "values: a": 144 * 20,
        "values: b": 144 * 20,
    }


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_parts_add_up_to_the_total(build):
    model = build()
    found = parts(model)
    assert sum(found.values()) == count(model, 8).total
    assert min(found.values()) > 0
    assert "other" not in found


def test_parts_by_hand():
    """A model that has all of them, each of a size that no other has."""
    memory = MemoryConfig(**MEMORY | {"layers": [2]}, mode="beside", value_dim=20, query_norm="batch")
    model = model_of({"kv_heads": 2}, memory, MoEConfig(experts=4, layers=[0], shared_experts=1))
    assert parts(model) == {
        "token embedding": 37 * 32,
        "output layer": 37 * 32,
        "attention": 3 * (2 * 32 * 32 + 2 * 32 * 16),
        "feed-forward networks": 2 * 3 * 32 * 64,
        "experts": 5 * 3 * 32 * 64 + 4 * 32,
        "memory: query": 32 * 24 + 24 + 2 * 24,
        "memory: half keys": 3 * 24 * 4,
        "memory: gate": 32 * 20 + 20,
        "memory: projection": 20 * 32 + 32,
        "norms": 7 * 32,
        "values: main": 144 * 20,
    }


def test_a_parameter_of_no_part_is_not_lost():
    model = model_of()
    model.own = torch.nn.Linear(3, 5)
    assert parts(model)["other"] == 20


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
    model = model_of({"layers": 1})
    model.blocks[0].feed_forward = torch.nn.Linear(32, 32)
    with pytest.raises(AttributeError, match="flops"):
        count(model, 8)
