"""What the benchmarks share: how time is taken, and how results are printed and written.

Times of one run are compared with each other only: the operations of a comparison take turns, one call each,
so that a machine that slows down slows all of them. Before every call the caches are filled with something
else. Medians are compared; minima are shown beside them.
"""

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from memlm.kernels.accounting import Cost

_PACKAGES = ("torch", "triton", "numba", "numpy", "product-key-memory", "PEER-pytorch")


@dataclass
class Setting:
    """How a benchmark runs."""

    device: torch.device
    quick: bool = False
    repeats: int = 9
    json: Path | None = None
    command: str = ""
    flush_bytes: int = 2**27
    """Read before every call: more than the caches hold (32 MB on CPUs, 60 MB on GPUs, or so)."""


def parse(description: str, name: str) -> Setting:
    """The options that all benchmarks have, from the command line.

    Args:
        description: Of the benchmark.
        name: Of its file.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="smaller tables and fewer repeats, under 60 s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    command = " ".join(["python", f"benchmarks/{name}", *sys.argv[1:]])
    repeats = 5 if arguments.quick else 9
    return Setting(torch.device(arguments.device), arguments.quick, repeats, arguments.json, command)


Operation = Callable[[], Any]
Timed = Operation | tuple[Operation, Operation]
"""What is timed; or a preparation that is not, and what is."""


def times(operations: Mapping[str, Timed], setting: Setting) -> dict[str, list[float]]:
    """Seconds of each call of each operation, after two calls of each that do not count.

    Operations take turns, and every other round backwards, so that none always follows the same one.
    """
    flush = _flush(setting)
    result: dict[str, list[float]] = {name: [] for name in operations}
    for repeat in range(-2, setting.repeats):
        turns = list(operations.items())
        for name, timed in turns if repeat % 2 else reversed(turns):
            prepare, run = timed if isinstance(timed, tuple) else (None, timed)
            if prepare is not None:
                prepare()
            flush()
            seconds = _seconds(run, setting.device)
            if repeat >= 0:
                result[name].append(seconds)
    return result


def _flush(setting: Setting) -> Operation:
    """What fills the caches: reads, since what is written in a cache would be written back in the call timed.

    On a CPU by one thread: those of torch would go on spinning for a while, and slow down what comes next.
    """
    buffer = torch.zeros(setting.flush_bytes // 4, device=setting.device)
    return buffer.sum if setting.device.type == "cuda" else buffer.numpy().sum


def _seconds(run: Operation, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start_time = time.perf_counter()
    run()
    return time.perf_counter() - start_time


@dataclass
class Row:
    """One measured operation."""

    name: str
    size: str
    seconds: list[float]
    moved: Cost | None = None
    """What it moves if every read fetches its row from memory."""
    limit: Cost | None = None
    """What it must move even with a perfect cache."""

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)


@dataclass
class Report:
    """The results of one benchmark.

    Args:
        setting: How it runs.
        bars: Of every ratio: the bar and the relation ``"<="`` or ``">="`` that is to hold, or both ends of
            a range and ``"in"``.
    """

    setting: Setting
    bars: Mapping[str, tuple[Any, str]]
    sizes: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    """Ratios that have a bar."""
    comparisons: dict[str, float] = field(default_factory=dict)
    """Ratios that have none."""
    unmeasured: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    copy_bytes: float = 0.0
    """This machine's bytes a second, read and written, of a copy."""
    minima: dict[str, float] = field(default_factory=dict)
    """Ratios of the fastest calls, beside those of the medians."""
    started: tuple[float, float, float] | None = field(default_factory=lambda: _cpu_seconds())

    def measure_copy(self, size: int) -> None:
        """Measure a copy of so many bytes, with which bandwidths are compared, and a pass that only reads."""
        source = torch.zeros(size // 4, device=self.setting.device)
        target = torch.ones_like(source)
        measured = times({"copy": lambda: target.copy_(source), "read only": source.sum}, self.setting)
        for name, streams in (("copy", 2), ("read only", 1)):
            cost = Cost(streams * source.nbytes, 0)
            self.rows[name] = Row(name, f"{source.nbytes / 2**20:,.0f} MiB", measured[name], cost, cost)
        self.copy_bytes = 2 * source.nbytes / self.rows["copy"].median

    def measure(
        self,
        size: str,
        operations: Mapping[str, Timed],
        *,
        moved: Mapping[str, Cost] | None = None,
        limit: Mapping[str, Cost] | None = None,
    ) -> None:
        """Time operations in turns and keep a row of each.

        Args:
            size: Shown in the table.
            operations: By name.
            moved: What an operation moves without a cache.
            limit: What it must move even with one; default: ``moved``.
        """
        moved = moved or {}
        limit = {**moved, **(limit or {})}
        for name, seconds in times(operations, self.setting).items():
            self.rows[name] = Row(name, size, seconds, moved.get(name), limit.get(name))

    def ratio(self, name: str, numerator: str, denominator: str) -> None:
        """Keep the ratio of two rows' medians: under the name of its bar, or among the comparisons."""
        kept = self.values if name in self.bars else self.comparisons
        above, below = self.rows[numerator], self.rows[denominator]
        kept[name] = above.median / below.median
        self.minima[name] = min(above.seconds) / min(below.seconds)

    @contextmanager
    def attempt(self, *bars: str) -> Iterator[None]:
        """Let the benchmark go on if this part of it fails: its bars are then unmeasured, and say why."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.unmeasured |= dict.fromkeys(bars, f"failed: {error!r}"[:500])

    def of_copy(self, name: str) -> float:
        """Bytes that a row moves in a second, over those of a copy."""
        row = self.rows[name]
        assert row.moved is not None
        return row.moved.bytes / row.median / self.copy_bytes

    def ratios(self) -> dict[str, dict[str, Any]]:
        """Value and bar of each ratio; null and a reason where it was not measured."""
        result = {}
        for name, (bar, holds) in self.bars.items():
            value = self.values.get(name)
            result[name] = {"value": value, "bar": bar, "holds": holds}
            if name in self.minima and value is not None:
                result[name]["value_of_minima"] = self.minima[name]
            if value is None:
                gpu = self.setting.device.type == "cuda"
                reason = "measured with --device cpu" if gpu else "needs a GPU"
                result[name]["unmeasured"] = self.unmeasured.get(name, reason)
            else:
                result[name]["met"] = _met(value, bar, holds)
                if self.setting.quick:
                    result[name]["quick"] = True  # at smaller sizes than the bar is for
        return result

    def other_load(self) -> float | None:
        """Cores that other processes kept busy since the start; None where that is not known.

        With two threads on two cores, one busy neighbour makes every parallel loop wait for the scheduler.
        """
        now = _cpu_seconds()
        if now is None or self.started is None:
            return None
        elapsed, all_of_it, own = (end - start for start, end in zip(self.started, now, strict=True))
        return max(0.0, all_of_it - own) / max(elapsed, 1e-9)

    def content(self) -> dict[str, Any]:
        """What the JSON holds."""
        content: dict[str, Any] = {
            "command": self.setting.command,
            "quick": self.setting.quick,
            "machine": machine(self.setting.device) | {"cores_used_by_others": self.other_load()},
            "versions": versions(),
            "sizes": self.sizes,
            "copy_gb_per_second": self.copy_bytes / 1e9,
            "medians": {name: row.median * 1000 for name, row in self.rows.items()},
            "ratios": self.ratios(),
            "comparisons": self.comparisons,
            "operations": [self._entry(row) for row in self.rows.values()],
        }
        return content | self.extra

    def _entry(self, row: Row) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "operation": row.name,
            "size": row.size,
            "median_ms": row.median * 1000,
            "min_ms": min(row.seconds) * 1000,
            "all_ms": [seconds * 1000 for seconds in row.seconds],
        }
        if row.moved is not None:
            entry["gb_per_second"] = row.moved.bytes / row.median / 1e9
            entry["of_copy"] = row.moved.bytes / row.median / self.copy_bytes
        if row.limit is not None:
            entry["over_limit"] = row.median * self.copy_bytes / row.limit.bytes
        return entry

    def finish(self) -> None:
        """Print the table and the ratios; write the JSON if asked for."""
        heads = f"{'median ms':>10} {'min ms':>9} {'GB/s':>7} {'of copy':>8} {'x limit':>8}"
        print(f"{'operation':48} {'size':34} {heads}")
        for row in self.rows.values():
            entry = self._entry(row)
            print(
                f"{row.name:48} {row.size:34} {entry['median_ms']:10.2f} {entry['min_ms']:9.2f} "
                f"{_number(entry.get('gb_per_second'), '7.1f')} {_number(entry.get('of_copy'), '8.2f')} "
                f"{_number(entry.get('over_limit'), '8.2f')}"
            )
        print()
        for name, ratio in self.ratios().items():
            bar = " to ".join(map(str, ratio["bar"])) if ratio["holds"] == "in" else f"{ratio['bar']:.3g}"
            relation = "" if ratio["holds"] == "in" else ratio["holds"]
            if ratio["value"] is None:
                print(f"{name:32} {'-':>10}  bar {relation} {bar}  unmeasured: {ratio['unmeasured']}")
            else:
                verdict = "pass" if ratio["met"] else "MISS"
                minima = f"  (of minima {self.minima[name]:.4f})" if name in self.minima else ""
                print(f"{name:32} {ratio['value']:10.4f}  bar {relation} {bar}  {verdict}{minima}")
        for name, value in self.comparisons.items():
            minima = f"  (of minima {self.minima[name]:.4f})" if name in self.minima else ""
            print(f"{name:32} {value:10.4f}  no bar{minima}")
        others = self.other_load()
        if others is not None and others > 0.05:
            print(f"not a quiet machine: other processes kept {others:.2f} cores busy")
        if self.setting.json is not None:
            self.setting.json.parent.mkdir(parents=True, exist_ok=True)
            self.setting.json.write_text(json.dumps(self.content(), indent=1) + "\n")


def _number(value: float | None, form: str) -> str:
    return format("-", f">{form.split('.')[0]}") if value is None else format(value, form)


def _met(value: float, bar: Any, holds: str) -> bool:
    if holds == "in":
        return bar[0] <= value <= bar[1]
    return value <= bar if holds == "<=" else value >= bar


def _cpu_seconds() -> tuple[float, float, float] | None:
    """The clock, the seconds that all CPUs were busy, and those of this process and its children."""
    statistics = Path("/proc/stat")
    if not statistics.exists():
        return None
    user, nice, system, _, _, interrupts, soft = map(int, statistics.read_text().split(maxsplit=8)[1:8])
    busy = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, sum(os.times()[:4])


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that measured."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    result: dict[str, Any] = {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["gpu"] = {"name": properties.name, "gib": properties.total_memory / 2**30}
    return result


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter; None: not installed."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    return result


def distinct(slots: Tensor) -> int:
    """How many different slots there are."""
    return int(slots.unique().numel())
