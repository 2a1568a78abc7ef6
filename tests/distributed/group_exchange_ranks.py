"""The collectives of a memory group against sums in one process; every rank checks what it has.

    torchrun --nproc_per_node 2 tests/distributed/group_exchange_ranks.py

Prints the order in which the parts of a block's passes ran, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memlm.memory import MemoryConfig, PEERConfig
from memlm.memory.pool import values_without_memory
from memlm.parallel import group_exchange
from memlm.parallel.group_exchange import GroupExchange
from memlm.parallel.mesh import memory_mesh
from memlm.parallel.placing import place
from memlm.transformer import Transformer, TransformerConfig

TOKENS, WIDTH = 6, 5

METHODS = ("gather", "sum_to_tokens", "columns_to_tokens", "tokens_to_columns")


def in_one_process(method: str, given: list[Tensor]) -> list[Tensor]:
    """What each rank gets of what all ranks give."""
    ranks = len(given)
    if method == "gather":
        return [torch.cat(given)] * ranks
    if method == "sum_to_tokens":
        return list(torch.stack(given).sum(0).chunk(ranks))
    if method == "columns_to_tokens":
        return list(torch.cat(given, 1).chunk(ranks))
    return list(torch.cat(given).chunk(ranks, 1))


def check(method: str, dtype: torch.dtype, wire: torch.dtype | None, between: bool) -> None:
    """Result and gradient, with other work of the group while it is under way."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    exchange = GroupExchange(dist.group.WORLD, wire)
    generator = torch.Generator().manual_seed(ranks)
    whole = method in ("sum_to_tokens", "columns_to_tokens")
    rows, columns = TOKENS * (ranks if whole else 1), WIDTH * (ranks if method == "tokens_to_columns" else 1)
    given = [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(ranks)]
    expected = in_one_process(method, [each.requires_grad_() for each in given])
    weights = [torch.randn(each.shape, generator=generator).to(dtype) for each in expected]
    sum((out * weight).sum() for out, weight in zip(expected, weights, strict=True)).backward()  # type: ignore[union-attr]

    own = given[rank].detach().clone().requires_grad_()
    arriving = getattr(exchange, method)(own)
    other = torch.full((3,), float(rank))
    if between:
        dist.all_reduce(other)
        assert other.tolist() == [sum(range(ranks))] * 3
    found = arriving()
    (found * weights[rank]).sum().backward()
    narrow = dtype == torch.bfloat16 or wire is not None
    tolerance = {"rtol": 2**-7, "atol": 2**-7 * ranks} if narrow else {"rtol": 1e-6, "atol": 1e-6}
    assert found.dtype == own.grad.dtype == dtype
    torch.testing.assert_close(found, expected[rank], **tolerance)
    torch.testing.assert_close(own.grad, given[rank].grad, **tolerance)
    if wire is not None and dtype == torch.float32:
        # Rounded once, and then added up in fp32.
        rounded = in_one_process(method, [each.detach().to(wire).to(dtype) for each in given])
        torch.testing.assert_close(found, rounded[rank], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(getattr(exchange, method)(own)(), found)


def check_slots(wire: torch.dtype | None) -> None:
    """Whole numbers travel as they are."""
    own = torch.tensor([[2**30 + 1 + dist.get_rank()]], dtype=torch.int32)
    found = GroupExchange(dist.group.WORLD, wire).gather(own)()
    expected = torch.arange(dist.get_world_size(), dtype=torch.int32).view(-1, 1) + 2**30 + 1
    assert torch.equal(found, expected)


def order(plan: MemoryConfig) -> list[str]:
    """The parts of a forward and a backward pass of one block, as they ran."""
    events: list[str] = []
    torch.manual_seed(0)
    with values_without_memory():
        model = Transformer(20, TransformerConfig(16, 1, 2, feed_forward_dim=32), plan)
    place(
        model, memory_mesh("cpu", dist.get_world_size(), dist.get_world_size(), "group"), torch.device("cpu")
    )

    def mark(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: events.append(name))
        module.register_full_backward_hook(lambda *_: events.append(f"{name}, backward"))

    block: Any = model.blocks[0]
    if block.feed_forward is not None:
        mark("feed-forward", block.feed_forward)
    if block.memory.gate is not None:
        mark("gate", block.memory.gate)
    flight = group_exchange._Flight
    begin, arrive = flight.begin, flight.arrive

    def begins(self: Any, collective: Any, x: Tensor) -> None:
        events.append("begin")
        begin(self, collective, x)

    def arrives(self: Any) -> Tensor:
        events.append("wait")
        return arrive(self)

    with patch.object(flight, "begin", begins), patch.object(flight, "arrive", arrives):
        model(torch.arange(8).view(2, 4)).square().sum().backward()
    return events


def main() -> None:
    """Runs all cases."""
    dist.init_process_group("gloo")
    for method in METHODS:
        for dtype in (torch.float32, torch.bfloat16):
            for wire in (None, torch.bfloat16):
                for between in (False, True):
                    check(method, dtype, wire, between)
    for wire in (None, torch.bfloat16):
        check_slots(wire)
    memory: dict[str, Any] = {"half_keys": 6, "heads": 2, "reads": 3, "key_dim": 8, "layers": [0]}
    plans: dict[str, MemoryConfig] = {
        "replace": MemoryConfig(**memory),
        "beside": MemoryConfig(**memory, mode="beside"),
        "peer beside": PEERConfig(**memory, mode="beside", gate="silu", query_norm="none"),
    }
    orders = {name: order(plan) for name, plan in plans.items() if 16 % dist.get_world_size() == 0}
    if dist.get_rank() == 0:
        print(json.dumps(orders), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
