"""Matched baselines, against a search through all sizes and the paper's own."""

import pytest
import torch
import yaml

import memlm
from memlm import matching
from memlm.flops import count
from memlm.matching import Baseline, baselines
from memlm.memory import MemoryConfig, PEERConfig
from memlm.memory.engram import EngramConfig
from memlm.transformer import MoEConfig, Transformer, TransformerConfig

SMALL = TransformerConfig(dim=32, layers=3, heads=4, feed_forward_dim=64)
MEMORY = MemoryConfig(half_keys=64, heads=2, reads=8, key_dim=16, layers=[1])


def total(transformer=SMALL, memory=None, moe=None) -> int:
    with torch.device("meta"):
        return count(Transformer(37, transformer, memory, moe), 16).total


def matched(memory, transformer=SMALL) -> dict[str, Baseline]:
    found = baselines(transformer, memory, total(transformer, memory), 37, 16)
    return {baseline.class_path: baseline for baseline in found}


def moe_total(experts: int) -> int:
    """By hand: every feed-forward network becomes so many, and a router."""
    return total() + 3 * (3 * 32 * 64 * (experts - 1) + 32 * experts)


def peer_total(half_keys: int) -> int:
    """By hand: one feed-forward network becomes queries (2 heads of 256 elements), keys and two pools."""
    query = 32 * 2 * 256 + 3 * 2 * 256  # weight, bias, batch norm
    return total() - 3 * 32 * 64 + query + 2 * 2 * half_keys * 128 + 2 * half_keys**2 * 32


@pytest.mark.parametrize("half_keys,value_dim", [(16, 8), (16, 96), (48, 32), (130, 8), (130, 96)])
def test_the_lowest_that_exceeds_the_memory_model(half_keys, value_dim):
    memory = MemoryConfig(half_keys=half_keys, heads=2, reads=8, layers=[1], value_dim=value_dim)
    target, found = total(memory=memory), matched(memory)

    moe, experts = found["memlm.MoELM"], 2
    while moe_total(experts) <= target:
        experts += 1
    assert moe.init_args["moe"] == {"experts": experts, "routing": "expert_choice", "top_k": 1}
    assert moe.counts.total == moe_total(experts)

    peer, step = found["memlm.PEERLM"], half_keys // 16
    keys = -(-8 // step) * step
    while peer_total(keys) <= target:
        keys += step
    assert peer.init_args["memory"] == {"half_keys": keys, "heads": 2, "reads": 8}
    assert peer.counts.total == peer_total(keys)


def test_dense_is_the_same_transformer():
    dense = matched(MEMORY)["memlm.DenseLM"]
    assert dense.counts.total == total()
    assert dense.init_args == {"transformer": {"dim": 32, "layers": 3, "heads": 4, "feed_forward_dim": 64}}


def test_options_of_the_transformer_are_kept():
    transformer = TransformerConfig(
        dim=32, layers=3, heads=4, kv_heads=2, tie_embeddings=True, rope_theta=5e5, vocab_size=64
    )
    for baseline in matched(MEMORY, transformer).values():
        options = yaml.safe_load(baseline.yaml())["model"]["init_args"]["transformer"]
        assert TransformerConfig(**options) == transformer


@pytest.mark.parametrize("memory", [MEMORY, MemoryConfig(half_keys=(16, 256), heads=2, reads=8, layers=[1])])
def test_the_yaml_is_the_model_that_was_counted(memory):
    for class_path, baseline in matched(memory).items():
        section = yaml.safe_load(baseline.yaml())["model"]
        assert section["class_path"] == class_path
        parts = section["init_args"]
        kinds = {"transformer": TransformerConfig, "moe": MoEConfig, "memory": PEERConfig}
        options = {name: kinds[name](**part) for name, part in parts.items()}
        model = getattr(memlm, class_path.removeprefix("memlm."))(37, **options)
        assert model.counts(16) == baseline.counts


@pytest.mark.parametrize(
    "base,memory,experts",
    [
        ((768, 12, 12), {}, 16),
        ((2048, 22, 32), {"count": 1, "key_dim": 256, "gate": "none", "projection": False}, 4),
    ],
)
def test_the_paper_s_baselines(base, memory, experts):
    """Of both sizes whose totals are printed: 0.984B and 1.037B, 3.545B and 3.646B."""
    dim, layers, heads = base
    transformer = TransformerConfig(dim=dim, layers=layers, heads=heads, vocab_size=32_000)
    found = matched(MemoryConfig(**memory), transformer)
    assert found["memlm.MoELM"].init_args["moe"]["experts"] == experts
    assert found["memlm.PEERLM"].init_args["memory"]["half_keys"] == 768
    printed = {768: (0.984, 1.037), 2048: (3.545, 3.646)}[dim]
    counted = [found[name].counts.total / 1e9 for name in ("memlm.MoELM", "memlm.PEERLM")]
    assert counted == pytest.approx(printed, abs=0.001)  # the last digit is rounded or cut


def test_no_experts_where_their_dims_do_not_allow_it():
    transformer = TransformerConfig(dim=32, layers=3, heads=4, feed_forward_dim=60)
    moe = matched(MEMORY, transformer)["memlm.MoELM"]
    assert moe.counts is None
    assert "model.moe.expert_dim: is 60" in moe.missing


@pytest.mark.parametrize("memory", [PEERConfig(half_keys=64, reads=8), EngramConfig(slots=500, count=1)])
def test_peer_is_matched_to_memory_layers_alone(memory):
    assert list(matched(memory)) == ["memlm.DenseLM", "memlm.MoELM"]


def test_matches_are_looked_for_far_enough():
    """A table of wide rows beside narrow feed-forward networks."""
    transformer = TransformerConfig(dim=8, layers=2, heads=1, feed_forward_dim=8)
    memory = MemoryConfig(half_keys=256, heads=1, reads=4, key_dim=4, value_dim=512, layers=[0])
    found = matched(memory, transformer)
    target = total(transformer, memory)
    for name in ("memlm.MoELM", "memlm.PEERLM"):
        assert target < found[name].counts.total < 1.2 * target
    assert found["memlm.MoELM"].init_args["moe"]["experts"] < matching._MOST_EXPERTS / 10
