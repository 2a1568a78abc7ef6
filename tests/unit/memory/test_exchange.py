"""A read in parts: what is sent when, and what runs between."""

import pytest
import torch
from torch import nn

from memlm.memory import MemoryConfig, MemoryLayer, MemoryPool, PEERConfig
from memlm.memory.value_expansion import expanded
from memlm.transformer import Transformer, TransformerConfig

DIM = 16
SMALL = {"half_keys": 6, "heads": 2, "reads": 3, "key_dim": 8, "layers": [0]}


class Recording:
    """The exchange of a single rank, that keeps what it gives until it is asked for, and says so."""

    size, rank = 1, 0

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def _sends(self, name: str, x):
        self.events.append(f"send {name}")

        def arrive():
            self.events.append(f"wait {name}")
            return x

        return arrive

    def gather(self, x):
        return self._sends("weights" if x.is_floating_point() else f"{x.dtype} slots", x)

    def columns_to_tokens(self, x):
        return self._sends("answers", x)

    def tokens_to_columns(self, x):
        return self._sends("hidden", x)

    def sum_to_tokens(self, x):
        return self._sends("products", x)


class Whole(MemoryPool):
    """A pool that has an exchange, and all columns."""

    @property
    def table(self):
        return self.values


def recorded(layer: MemoryLayer, pools: list[MemoryPool], beside: bool) -> list[str]:
    events: list[str] = []
    for pool in pools:
        pool.exchange = Recording(events)
    if layer.gate is not None:
        layer.gate.register_forward_hook(lambda *_: events.append("gate"))

    def network(hidden):
        events.append("beside")
        return hidden

    layer(torch.randn(1, 5, DIM), pools, None, **({"beside": network} if beside else {}))
    return events


SLOTS = "torch.int32 slots"


@pytest.mark.parametrize(
    "config,beside,expected",
    [
        (
            MemoryConfig(**SMALL),
            False,
            [
                *(f"send {SLOTS}", "send weights", "gate", f"wait {SLOTS}", "wait weights"),
                *("send answers", "wait answers"),
            ],
        ),
        (
            MemoryConfig(**SMALL),
            True,
            [
                *(f"send {SLOTS}", "send weights", "beside", f"wait {SLOTS}", "wait weights"),
                *("send answers", "gate", "wait answers"),
            ],
        ),
        (
            PEERConfig(**SMALL, gate="silu"),
            True,
            [
                *(f"send {SLOTS}", "send hidden", "beside", f"wait {SLOTS}", "wait hidden"),
                *("send products", "gate", "wait products", "send weights", "wait weights"),
                *("send answers", "wait answers"),
            ],
        ),
    ],
    ids=["memory", "memory beside", "PEER beside"],
)
def test_own_work_runs_while_something_is_on_its_way(config, beside, expected):
    layer = MemoryLayer(config, DIM)
    layer.initialise(1.0)
    pools: list[MemoryPool] = [Whole(36, DIM) for _ in range(1 + (layer.activation is not None))]
    for pool in pools:
        pool.initialise(1.0)
    assert recorded(layer, pools, beside) == expected


def test_slots_are_sent_in_the_smallest_type_and_once_for_all_virtual_tables():
    pool = Whole(7, 4)
    pool.initialise(1.0)
    events: list[str] = []
    pool.exchange = Recording(events)
    slots = torch.randint(0, 7 * 3, (5, 2))  # int64
    weights = torch.rand(5, 2)
    read = pool.start_read(pool.send(slots, 3), weights).finish()
    assert events[:4] == [f"send {SLOTS}", "send weights", f"wait {SLOTS}", "wait weights"]
    assert events[4:] == ["send answers", "wait answers"]
    expected = torch.zeros(5, 3, 4)
    for token in range(5):
        for slot, weight in zip(slots[token], weights[token], strict=True):
            expected[token, slot // 7] += weight * pool.values.detach()[slot % 7]
    torch.testing.assert_close(read.view(5, 3, 4), expected)
    rows, parts = expanded(slots, weights, 7, 3)
    torch.testing.assert_close(pool.read(rows, parts), read)


@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_one_rank_compiles_without_a_break(mode):
    torch.manual_seed(0)
    plan = MemoryConfig(**SMALL, mode=mode, kernels="reference")
    model = Transformer(20, TransformerConfig(DIM, 1, 2, feed_forward_dim=32), plan)
    tokens = torch.arange(6).view(1, 6)
    explained = torch._dynamo.explain(model)(tokens)
    assert explained.graph_break_count == 0, explained.break_reasons


def test_a_block_adds_network_and_memory_in_the_same_order_whoever_runs_first():
    torch.manual_seed(0)
    plan = MemoryConfig(**SMALL, mode="beside", kernels="reference")
    model = Transformer(20, TransformerConfig(DIM, 1, 2, feed_forward_dim=32), plan)
    (block,) = model.blocks
    tokens = torch.arange(6).view(1, 6)
    seen = {}
    block.feed_forward_norm.register_forward_hook(
        lambda _, given, out: seen.update(before=given[0], normed=out)
    )
    block.register_forward_hook(lambda _, given, out: seen.update(after=out))
    model(tokens)
    assert isinstance(block.feed_forward, nn.Module)
    read = block.memory(seen["normed"], [model.pools["main"]])
    assert torch.equal(seen["after"], seen["before"] + block.feed_forward(seen["normed"]) + read)
