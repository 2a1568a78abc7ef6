"""Slot usage where a pool is read by dot products only, with weights of any sign, or in several parts."""

from types import SimpleNamespace

import pytest
import torch

from callbacks.slot_usage import SlotUsage, kl_from_uniform
from memlm.language_models import MemoryLM
from memlm.memory import MemoryConfig
from memlm.transformer import TransformerConfig


@pytest.mark.parametrize("options", [{"pre_values": "silu"}, {"value_expansion": 4}], ids=str)
def test_every_read_counts_with_the_size_of_its_weight(options):
    torch.manual_seed(0)
    memory = MemoryConfig(half_keys=8, heads=2, reads=3, key_dim=4, layers=[0], **options)
    model = MemoryLM(20, TransformerConfig(16, 1, 2, feed_forward_dim=16), memory)
    seen = {name: [] for name in model.pools}
    for name, pool in model.pools.items():
        pool.observers.append(lambda slots, weights, name=name: seen[name].append((slots, weights)))
    usage, state = SlotUsage(), SimpleNamespace(global_step=0)
    usage.setup(state, model, "validate")
    targets = torch.tensor([[3, 4, 5], [6, -100, -100]])  # the last two positions count nowhere
    usage.on_validation_batch_start(state, model, {"targets": targets})
    with torch.no_grad():
        model.transformer(torch.randint(20, (2, 3)))
    assert (
        set(usage._evaluation)
        == set(seen)
        == ({"main", "main_down"} if "pre_values" in options else {"main"})
    )
    for name, ((slots, weights),) in seen.items():
        parts = len(slots) // 6
        assert parts == options.get("value_expansion", 1)
        sums = [0.0] * model.pools[name].slots
        for token in range(4):
            for part in range(parts):
                row = token * parts + part
                for slot, weight in zip(slots[row].tolist(), weights[row].tolist(), strict=True):
                    sums[slot] += abs(weight)
        found = usage._evaluation[name]
        torch.testing.assert_close(found, torch.tensor(sums, dtype=torch.float64))
        assert 0 < kl_from_uniform(found) < 10
    if "pre_values" in options:
        assert (seen["main"][0][1] < 0).any()
        assert usage._evaluation["main_down"].sum() == 4 * 2 * 3  # every read is one
