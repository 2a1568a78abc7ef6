"""Row gradients among replicas: rows with their numbers against whole stretches, at shares of touched rows.

    python benchmarks/row_exchange.py --json benchmarks/results/row_exchange.json

Two and four processes (gloo) on this machine, a thread each; every process is a replica, and touches rows of
its own choice. A time is that of the slowest rank. The crossover is where the two ways take equally long.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.measure import machine, versions
from memlm.kernels.interface import RowSums
from memlm.parallel import row_exchange
from memlm.parallel.mesh import memory_mesh
from memlm.parallel.row_exchange import RowExchange

SHARES = (1, 6, 12, 25, 50, 75, 100)
WAYS = {"rows": (2.0, 2.0), "whole": (0.0, 0.0)}
"""Shares of rows above which whole stretches are sent, that choose a way."""


def on_rank(slots: int, dim: int, repeats: int) -> dict[str, Any]:
    """All measurements of one number of processes; on every rank, of the slowest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = memory_mesh("cpu", dist.get_world_size(), 1, "group")
    generator = torch.Generator().manual_seed(dist.get_rank())
    table = torch.zeros(slots, dim)
    exchanges = {way: RowExchange(table, mesh, "auto", *above) for way, above in WAYS.items()}
    sums = torch.randn(slots, dim, generator=generator)
    results = []
    for share in SHARES:
        count = round(slots * share / 100)
        touched = torch.randperm(slots, generator=generator)[:count].sort().values.int()
        own = RowSums(touched, sums[:count], sums[:count, 0])
        seconds: dict[str, list[float]] = {}
        memory: dict[str, int] = {}
        merged = {}
        for repeat in range(-1, repeats):
            for way, exchange in exchanges.items():
                for name, run in (
                    ("merge", lambda: merged.update({way: exchange.merge(own)})),  # noqa: B023
                    ("share", lambda: exchange.share(merged[way].rows)),  # noqa: B023
                ):
                    if name == "merge":
                        merged.pop(way, None)
                    before = _peak_from_now()
                    taken = _slowest(run)
                    memory[f"{name} {way}"] = _peak() - before
                    if repeat >= 0:
                        seconds.setdefault(f"{name} {way}", []).append(taken)
        one, two = merged.values()
        assert torch.equal(one.rows, two.rows)
        distance = float((one.sums - two.sums).abs().max())
        results.append(
            {
                "share_percent": share,
                "owned_rows_touched_percent": 100 * len(merged["rows"].rows) / exchanges["rows"].rows,
                "largest_distance": distance,
                "median_ms": {name: 1000 * median(taken) for name, taken in seconds.items()},
                "min_ms": {name: 1000 * min(taken) for name, taken in seconds.items()},
                "megabytes_beside": {name: taken / 2**20 for name, taken in memory.items()},
            }
        )
        merged.clear()
    return {"processes": dist.get_world_size(), "shares": results, "collectives": _collectives(repeats)}


def _collectives(repeats: int) -> dict[str, float]:
    """Milliseconds to sum 16 MiB: by reduce_scatter, or all_to_all and additions; and that in bf16."""
    ranks = dist.get_world_size()
    given = torch.ones(row_exchange._ELEMENTS_AT_ONCE)
    narrow = given.bfloat16()
    result = given.new_empty(len(given) // ranks)
    taken, narrow_taken = torch.empty_like(given), torch.empty_like(narrow)

    def added(taken: torch.Tensor, given: torch.Tensor) -> None:
        dist.all_to_all_single(taken, given)
        total, *others = taken.view(ranks, -1)
        total = total.float()
        for other in others:
            total += other

    runs: dict[str, Callable[[], Any]] = {
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(result, given),
        "all_to_all": lambda: added(taken, given),
        "all_to_all, bf16": lambda: added(narrow_taken, given.to(torch.bfloat16)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(_slowest(run))
    return {name: 1000 * median(taken[1:]) for name, taken in times.items()}


def _slowest(run: Callable[[], Any]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    run()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _peak_from_now() -> int:
    """Bytes resident; the peak is taken from now on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("VmRSS") * 1024


def _peak() -> int:
    return _kilobytes("VmHWM") * 1024


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def crossover(shares: list[dict[str, Any]], name: str, axis: str) -> float | None:
    """Percent at which whole stretches become faster for good, between those measured; None if nowhere."""
    result = before = None
    for entry in shares:
        times = entry["median_ms"]
        gap, share = times[f"{name} whole"] - times[f"{name} rows"], entry[axis]
        if gap > 0:
            result = None
        elif result is None:
            result = (
                share if before is None else before[0] + (share - before[0]) * before[1] / (before[1] - gap)
            )
        before = share, gap
    return result


def main() -> None:
    """Starts the processes, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="a smaller table and fewer repeats")
    parser.add_argument("--slots", type=int, help="of the table; default: 131072, quick 16384")
    parser.add_argument("--dim", type=int, default=256, help="elements of a row")
    arguments = parser.parse_args()
    slots = arguments.slots or (1 << 14 if arguments.quick else 1 << 17)
    repeats = 3 if arguments.quick else 7
    if "RANK" in os.environ:
        result = on_rank(slots, arguments.dim, repeats)
        if dist.get_rank() == 0:
            print(json.dumps(result))
        dist.destroy_process_group()
        return
    content = {
        "command": " ".join(["python", "benchmarks/row_exchange.py", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "sizes": {
            "slots": slots,
            "dim": arguments.dim,
            "dtype": "float32",
            "table_mb": slots * arguments.dim / 2**18,
        },
        "processes": [],
    }
    for processes in (2, 4):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        words = [sys.executable, *launcher, *sys.argv]
        one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        done = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, env=os.environ | one_thread, check=True
        )
        result = json.loads(done.stdout.strip().splitlines()[-1])
        result["crossover_percent"] = {
            "merge": crossover(result["shares"], "merge", "share_percent"),
            "share": crossover(result["shares"], "share", "owned_rows_touched_percent"),
        }
        content["processes"].append(result)
        _show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def _show(result: dict[str, Any]) -> None:
    names = [f"{name} {way}" for name in ("merge", "share") for way in WAYS]
    print(f"{result['processes']} processes, median ms (MB beside): " + ", ".join(names))
    for entry in result["shares"]:
        cells = [f"{entry['median_ms'][n]:8.1f} ({entry['megabytes_beside'][n]:5.0f})" for n in names]
        print(f"{entry['share_percent']:4} % {' '.join(cells)}  distance {entry['largest_distance']:.0e}")
    print("crossover, %:", result["crossover_percent"])
    print("sum of 16 MiB, ms:", {name: round(taken, 1) for name, taken in result["collectives"].items()})


if __name__ == "__main__":
    main()
