"""What a memory group's communication costs a step, and how much of it the layer's own work hides.

    python benchmarks/overlap.py --json benchmarks/results/overlap.json

Two gloo processes with a thread each train a model whose values are split between them (G = 2), and one
process with two threads the same model on twice the local batch: the cores and the tokens of a step are the
same. The two sides take turns, in processes of their own; medians of one run are compared.

The two processes take each step in three ways, in turns:

- ``overlapped``: as it is. A layer does its own work while slots, weights and answers are under way.
- ``back to back``: everything that is sent is waited for at once.
- ``local copies``: the memory sends nothing; tensors of the same sizes are copied instead.

``back to back`` less ``local copies`` is the time of the memory's communication; what ``overlapped`` takes
less than ``back to back`` is hidden. What FSDP2 sends of the dense parameters is in all three. On a CPU gloo
moves bytes by threads on the cores that calculate: what is hidden here says little of GPUs and their
network.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import machine, versions
from memlm.memory import MemoryConfig
from memlm.memory.exchange import Arriving
from memlm.memory.pool import values_without_memory
from memlm.metrics import summed_loss
from memlm.optim import OptimizerConfig, ValuesOptimizerConfig, clip_gradients, configure
from memlm.parallel.group_exchange import GroupExchange
from memlm.parallel.mesh import memory_mesh
from memlm.parallel.placing import place
from memlm.transformer import Transformer, TransformerConfig

RANKS, VOCAB, DIM, LAYERS, LENGTH = 2, 4096, 256, 4, 128
SIZES = ("sequences", "half_keys", "repeats", "rounds")
MODES = ("replace", "beside")
WIRES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


class BackToBack(GroupExchange):
    """Waits for everything that is sent at once."""

    def _gather(self, x: Tensor) -> Arriving:
        return _at_once(super()._gather(x))

    def _sum_and_scatter(self, x: Tensor) -> Arriving:
        return _at_once(super()._sum_and_scatter(x))

    def _to_tokens(self, x: Tensor) -> Arriving:
        return _at_once(super()._to_tokens(x))

    def _to_columns(self, x: Tensor) -> Arriving:
        return _at_once(super()._to_columns(x))


class LocalCopies(BackToBack):
    """Copies what it has into what others would have filled: the sizes are the same, the numbers are not."""

    def _gather(self, x: Tensor) -> Arriving:
        copied = torch.cat([self._on_the_wire(x)] * self.size).to(x.dtype)
        return lambda: copied

    def _sum_and_scatter(self, x: Tensor) -> Arriving:
        copied = self._on_the_wire(x)[: len(x) // self.size].to(x.dtype, copy=True)
        return lambda: copied

    def _swap(self, x: Tensor) -> Arriving:
        copied = x.clone(memory_format=torch.contiguous_format)
        return lambda: copied


WAYS = {"overlapped": GroupExchange, "back to back": BackToBack, "local copies": LocalCopies}


def _at_once(arriving: Arriving) -> Arriving:
    arrived = arriving()
    return lambda: arrived


class Training:
    """A model and its optimizer, on one process or on all.

    Args:
        mode: Of the memory.
        half_keys: ``K``; the table has ``K^2`` rows.
        wire: What the memory's numbers travel as.
        ranks: 1, or :data:`RANKS`.
    """

    def __init__(self, mode: Any, half_keys: int, wire: torch.dtype | None, ranks: int) -> None:
        torch.manual_seed(0)
        plan = MemoryConfig(half_keys=half_keys, heads=4, reads=32, key_dim=128, layers=[0, 2], mode=mode)
        config = TransformerConfig(DIM, LAYERS, 4, feed_forward_dim=1024)
        if ranks == 1:
            self.model = Transformer(VOCAB, config, plan)
        else:
            with values_without_memory():
                self.model = Transformer(VOCAB, config, plan)
            mesh = memory_mesh("cpu", ranks, ranks, "group")
            place(self.model, mesh, torch.device("cpu"), wire_dtype=wire)
            self.exchanges = {name: way(mesh.group, wire) for name, way in WAYS.items()}
        gradients = {pool.values: pool.gradient for pool in self.model.pools.values()}
        options = OptimizerConfig(learning_rate=1e-4), ValuesOptimizerConfig(learning_rate=1e-4)
        self.optimizer, _ = configure(self.model.named_parameters(), gradients, *options, 1000)

    def step(self, tokens: Tensor) -> float:
        """One step; its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = summed_loss(self.model(tokens[:, :-1]), tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()
        return time.perf_counter() - start

    @contextmanager
    def way(self, name: str) -> Iterator[None]:
        """Within it, the memory sends in one of the ways."""
        mergings = [pool.gradient.merging for pool in self.model.pools.values()]
        for pool, merging in zip(self.model.pools.values(), mergings, strict=True):
            pool.exchange = self.exchanges[name]
            if name == "local copies":  # squares of rows stay here, too: the ranks now read different rows
                merging.group = merging.replicas
        yield
        for merging in mergings:
            merging.group = merging.mesh.group


def _batch(sequences: int, generator: torch.Generator) -> Tensor:
    return torch.randint(VOCAB, (sequences, LENGTH + 1), generator=generator)


def on_ranks(sequences: int, half_keys: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the slowest rank of each step, by mode and dtype on the wire, and way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(dist.get_rank())
    found: dict[str, dict[str, list[float]]] = {}
    for mode in MODES:
        for wire, dtype in WIRES.items():
            training = Training(mode, half_keys, dtype, RANKS)
            times: dict[str, list[float]] = {name: [] for name in WAYS}
            for repeat in range(-1, repeats):
                turns = list(WAYS)
                for name in turns if repeat % 2 else reversed(turns):
                    tokens = _batch(sequences, generator)
                    dist.barrier()
                    with training.way(name):
                        seconds = torch.tensor(training.step(tokens))
                    dist.all_reduce(seconds, dist.ReduceOp.MAX)
                    if repeat >= 0:
                        times[name].append(float(seconds))
            found[f"{mode}, {wire} sent"] = times
            del training
    dist.destroy_process_group()
    return found


def in_one_process(sequences: int, half_keys: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each step, by mode."""
    torch.set_num_threads(RANKS)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for mode in MODES:
        training = Training(mode, half_keys, None, 1)
        times = [training.step(_batch(sequences * RANKS, generator)) for _ in range(repeats + 1)]
        found[mode] = {"one process": times[1:]}
    return found


def summary(
    times: dict[str, dict[str, list[float]]], single: dict[str, dict[str, list[float]]]
) -> list[dict]:
    """Medians of each case, and what follows from them."""
    rows = []
    for case, of_ways in times.items():
        mode = case.split(",")[0]
        ms = {name: 1000 * median(taken) for name, taken in of_ways.items()}
        ms["one process"] = 1000 * median(single[mode]["one process"])
        communication = ms["back to back"] - ms["local copies"]
        hidden = ms["back to back"] - ms["overlapped"]
        rows.append(
            {
                "case": case,
                "median_ms": ms,
                "min_ms": {name: 1000 * min(taken) for name, taken in of_ways.items()}
                | {"one process": 1000 * min(single[mode]["one process"])},
                "step_over_one_process": ms["overlapped"] / ms["one process"],
                "memory_communication_of_step": communication / ms["back to back"],
                "hidden_of_communication": hidden / communication if communication > 0 else None,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Of :func:`summary`."""
    heads = ("case", "one process ms", *(f"{name} ms" for name in WAYS))
    lines = ["| " + " | ".join((*heads, "step / one process", "communication", "of it hidden")) + " |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for row in rows:
        ms, hidden = row["median_ms"], row["hidden_of_communication"]
        cells = [row["case"], *(f"{ms[name]:.0f}" for name in ("one process", *WAYS))]
        cells += [f"{row['step_over_one_process']:.2f}", f"{row['memory_communication_of_step']:.1%}"]
        cells.append("-" if hidden is None else f"{hidden:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _started(words: list[str], threads: int) -> dict[str, dict[str, list[float]]]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measures both sides in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=8, help=f"of {LENGTH} tokens, a rank [8]")
    parser.add_argument(
        "--half_keys", type=int, default=256, help="the table has the square of it rows [256]"
    )
    parser.add_argument("--repeats", type=int, default=5, help="steps of a round [5]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of either side [3]")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--work", choices=("ranks", "one"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.sequences, options.half_keys, options.repeats)
    if options.work is not None:
        found = (on_ranks if options.work == "ranks" else in_one_process)(*sizes)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found))
        return
    given = [f"--{name}={getattr(options, name)}" for name in SIZES]
    script = [str(Path(__file__).resolve()), *given, "--work"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    ranks: dict[str, dict[str, list[float]]] = {}
    single: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        _join(ranks, _started([sys.executable, *launcher, *script, "ranks"], 1))
        _join(single, _started([sys.executable, *script, "one"], RANKS))
    rows = summary(ranks, single)
    print(table(rows))
    if options.json:
        content = {
            "command": " ".join(["python benchmarks/overlap.py", *sys.argv[1:]]),
            "machine": machine(torch.device("cpu")),
            "versions": versions(),
            "sizes": {name: getattr(options, name) for name in SIZES}
            | {"length": LENGTH, "dim": DIM, "layers": LAYERS, "vocabulary": VOCAB, "ranks": RANKS},
            "cases": rows,
            "seconds": {"ranks": ranks, "one process": single},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _join(all_of: dict[str, dict[str, list[float]]], more: dict[str, dict[str, list[float]]]) -> None:
    for case, times in more.items():
        for name, taken in times.items():
            all_of.setdefault(case, {}).setdefault(name, []).extend(taken)


if __name__ == "__main__":
    main()
