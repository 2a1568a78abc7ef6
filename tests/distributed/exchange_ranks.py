"""The row exchange of several ranks against sums in one process; every rank checks what it has.

    torchrun --nproc_per_node 4 tests/distributed/exchange_ranks.py '{"group": 2}'

Prints "ok" and the number of cases.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor

from memlm.memory.row_gradient import RowGradient
from memlm.parallel import row_exchange
from memlm.parallel.mesh import MemoryMesh, memory_mesh
from memlm.parallel.row_exchange import RowExchange

ROWS_ONLY, WHOLE, MEASURED = (2.0, 2.0), (0.0, 0.0), ()
TOKENS, READS = 60, 3


def draw(spread: str, slots: int, replica: int, generator: torch.Generator) -> Tensor:
    """``[N, L]`` slots that the tokens of a replica's group read."""
    shape = (TOKENS, READS)
    if spread == "uniform":
        return torch.randint(slots, shape, generator=generator)
    if spread == "skewed":  # most of it in the first block
        return (torch.rand(shape, generator=generator) ** 4 * slots).long()
    if spread == "one row":
        return torch.full(shape, slots - 1)
    if spread == "all rows":
        return torch.arange(shape[0] * shape[1]).view(shape) % slots
    if spread == "one replica reads nothing":
        return torch.randint(slots, (0 if replica == 0 else TOKENS, READS), generator=generator)
    if spread == "nobody reads":
        return torch.zeros(0, READS, dtype=torch.long)
    raise AssertionError(spread)


SPREADS = ("uniform", "skewed", "one row", "all rows", "one replica reads nothing", "nobody reads")


def check(
    mesh: MemoryMesh,
    spread: str,
    slots: int,
    dtype: torch.dtype,
    filtered: bool,
    number: int,
    wire: torch.dtype | None = None,
) -> None:
    """All ways of one case."""
    dim, generator = 8, torch.Generator().manual_seed(number)
    width = dim // mesh.group_size
    mine = slice(mesh.place * width, (mesh.place + 1) * width)
    values = torch.randn(slots, dim, generator=generator).to(dtype)
    row_filter = torch.rand(slots, generator=generator) < 0.5 if filtered else None

    expected = torch.zeros(slots, dim, dtype=torch.float64)
    touched = torch.zeros(slots, dtype=torch.bool)
    reads, largest = [], 0.0
    for replica in range(mesh.groups):
        read = draw(spread, slots, replica, generator)
        weights = torch.rand(read.shape, generator=generator)
        grad = torch.randn(len(read), dim, generator=generator)
        reads.append((read, weights, grad))
        kept = torch.ones_like(read, dtype=torch.bool) if row_filter is None else row_filter[read]
        each = (weights.double() * kept)[..., None] * grad.double()[:, None]
        of_replica = torch.zeros_like(expected).index_add_(0, read.flatten(), each.flatten(0, 1))
        expected += of_replica
        largest += float(of_replica.abs().max()) / dist.get_world_size()
        touched[read[kept]] = True
    expected /= dist.get_world_size()

    found: dict[tuple[float, ...], Any] = {}
    for way in (ROWS_ONLY, WHOLE, MEASURED):
        table = values[:, mine].clone()
        above = dict(zip(("merge_whole_above", "share_whole_above"), way, strict=False))
        exchange = RowExchange(table, mesh, "reference", wire_dtype=wire, **above)
        gradient = RowGradient(slots, "reference")
        gradient.merging, gradient.row_filter = exchange, row_filter
        read, weights, grad = reads[mesh.replica]
        if len(read):
            gradient.take(table, read.int(), weights, grad[:, mine].contiguous())
        sums = gradient.final()
        block = slice(exchange.first, exchange.first + exchange.rows)
        rows = sums.rows.long() + exchange.first
        assert torch.equal(rows, touched[block].nonzero().flatten() + exchange.first), "rows"
        # A row is summed over up to 180 reads in fp32.
        # In bf16 each replica's sum is off by at most 2^-8 of it; the largest of a case bounds them all.
        exact = wire is None or mesh.groups == 1
        off = 1e-5 if exact else 1e-5 + 2**-8 * largest
        torch.testing.assert_close(sums.sums.double(), expected[rows][:, mine], rtol=1e-6, atol=off)
        squares = (expected[rows] if exact else _whole(sums.sums.double(), mesh)).square().sum(1)
        torch.testing.assert_close(sums.squares.double(), squares, rtol=1e-5, atol=1e-5)
        norm = gradient.norm()
        if exact:
            torch.testing.assert_close(norm, expected.norm().float(), rtol=1e-5, atol=1e-6)

        table[rows] = (table[rows].float() - sums.sums).to(dtype)
        exchange.share(sums.rows)
        after = (values.float()[:, mine] - expected[:, mine].float()).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(table, after, rtol=tolerance, atol=tolerance + off)
        assert torch.equal(table[~touched], values[:, mine][~touched]), "rows that nobody reads"
        whole = [torch.empty_like(table) for _ in range(mesh.groups)]
        dist.all_gather(whole, table, group=mesh.replicas)
        assert all(torch.equal(table, other) for other in whole), "replicas differ"
        found[way] = (rows, sums.sums, sums.squares, table)
    for other in (WHOLE, MEASURED):
        for one, two in zip(found[ROWS_ONLY], found[other], strict=True):
            assert torch.equal(one, two), "the ways differ"


def main(options: dict[str, Any]) -> None:
    """Runs all cases."""
    dist.init_process_group("gloo")
    sent = _watch_sizes()
    mesh = memory_mesh("cpu", dist.get_world_size(), options["group"], "group")
    number = 0
    for at_once in (1 << 22, 64):  # all in one turn, and in many
        row_exchange._ELEMENTS_AT_ONCE = at_once
        sent.clear()
        for spread in SPREADS:
            for slots in (64, 101, 3):
                for dtype in (torch.float32, torch.bfloat16):
                    for filtered in (False, True):
                        number += 1
                        check(mesh, spread, slots, dtype, filtered, number)
                        if slots == 101:
                            number += 1
                            check(mesh, spread, slots, dtype, filtered, number, torch.bfloat16)
        if at_once == 64:
            # Rows that lie closely are more than 64, at most the geometric mean of that and the table.
            assert max(sent, default=0) < 2 * (64 * 101 * 8) ** 0.5 < 101 * 8 / 1.5
        assert bool(sent) == (mesh.groups > 1)
    if dist.get_rank() == 0:
        print("ok", number, flush=True)
    dist.destroy_process_group()


def _whole(columns: Tensor, mesh: MemoryMesh) -> Tensor:
    """All columns of the rows of which the ranks of a group have some each."""
    parts = [torch.empty_like(columns) for _ in range(mesh.group_size)]
    dist.all_gather(parts, columns, group=mesh.group)
    return torch.cat(parts, 1)


def _watch_sizes() -> list[int]:
    """Elements of all tensors that an all_to_all takes, as they come."""
    sizes: list[int] = []
    original = dist.all_to_all_single

    def watched(output: Tensor, given: Tensor, *others: Any, **named: Any) -> Any:
        sizes.append(output.numel())
        return original(output, given, *others, **named)

    dist.all_to_all_single = watched
    return sizes


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
