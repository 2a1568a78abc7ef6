"""UltraMemV2's arrangement by options alone: beside every feed-forward network, one head, pre-values."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memlm.flops import count
from memlm.memory import Inputs, MemoryConfig, TuckerConfig
from memlm.optim import MemoryAdamW, assign, clip_gradients
from memlm.transformer import Transformer, TransformerConfig

GROUPS = ["early", "early", "late", "late"]
CONFIG = TransformerConfig(dim=16, layers=4, heads=2, feed_forward_dim=24)


def memory(**options) -> MemoryConfig:
    defaults = {
        "half_keys": 8, "heads": 1, "reads": 5, "key_dim": 8, "value_dim": 8, "gate": "none",
        "pre_values": "silu", "query_norm": "qk", "mode": "beside", "layers": [0, 1, 2, 3],
        "layer_pools": GROUPS,
    }  # fmt: skip
    return MemoryConfig(**(defaults | options))


def transformer(**options) -> Transformer:
    torch.manual_seed(0)
    return Transformer(20, CONFIG, memory(**options))


def test_groups_of_blocks_share_their_pools():
    model = transformer()
    assert {name: tuple(pool.values.shape) for name, pool in model.pools.items()} == {
        "early": (64, 8), "late": (64, 8), "early_down": (64, 16), "late_down": (64, 16)
    }  # fmt: skip
    assert [list(block.pool_names) for block in model.blocks] == [[name, f"{name}_down"] for name in GROUPS]
    assert all(block.feed_forward is not None for block in model.blocks)
    assert not any(pool.gradient.alone for pool in model.pools.values())


@torch.no_grad()
def test_a_block_adds_both_outputs_of_one_normalised_input():
    model = transformer().double()
    block = model.blocks[2]
    hidden = torch.randn(2, 6, 16, dtype=torch.float64)
    seen = {}

    def look(_, given, output) -> None:
        seen.update(input=given[0], dense=output)

    block.feed_forward.register_forward_hook(look)
    pools = [model.pools[name] for name in block.pool_names]
    rotary = (torch.ones(6, 4, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64))
    block.attention.forward = lambda hidden, *_: torch.zeros_like(hidden)
    inputs = Inputs(torch.zeros(2, 6, dtype=torch.long))
    output = block(hidden, rotary, None, model.pools, inputs)
    torch.testing.assert_close(seen["input"], F.rms_norm(hidden, (16,), eps=CONFIG.norm_eps))
    torch.testing.assert_close(output, hidden + seen["dense"] + block.memory(seen["input"], pools))


@pytest.mark.parametrize(
    "options",
    [{}, {"value_expansion": 2, "gate": "silu"}, {"tucker": TuckerConfig(rank=2)}],
    ids=["plain", "expanded", "tucker"],
)
def test_training_moves_the_rows_read_of_all_pools_and_lowers_the_loss(options):
    model = transformer(**options)
    groups = [
        {"params": parameters, "name": name, "kind": "memory" if name == "values" else "dense"}
        for name, parameters in assign(model.named_parameters()).items()
    ]
    gradients = {pool.values: pool.gradient for pool in model.pools.values()}
    optimizer = MemoryAdamW(groups, gradients, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (4, 12), generator=generator)
    read = {name: set() for name in model.pools}
    for name, pool in model.pools.items():
        pool.observers.append(lambda slots, _, name=name: read[name].update(slots.flatten().tolist()))
    before = {name: pool.values.detach().clone() for name, pool in model.pools.items()}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, pool in model.pools.items():
        moved = (pool.values != before[name]).any(1).nonzero().flatten().tolist()
        assert moved
        assert set(moved) <= read[name]


def test_flops_and_reads_of_the_model():
    model = transformer()
    tokens = torch.zeros(2, 10, dtype=torch.int64)
    counts = count(model, 10)
    assert counts.values_read_per_token == 4 * 2 * 5
    assert counts.bytes_read_per_token == 4 * 5 * (8 + 16) * 4
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)
    assert counter.get_total_flops() / 20 == pytest.approx(counts.flops_per_token, rel=0.02)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits.sum().backward()
    assert counter.get_total_flops() / 20 == pytest.approx(counts.backward_flops_per_token, rel=0.02)
