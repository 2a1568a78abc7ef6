"""Losses under every strategy, on 1, 2 and 4 processes, beside those of one process without any.

    python benchmarks/strategies.py --json benchmarks/results/strategies.json

starts gloo processes on this machine, in which Trainers fit small models for 20 steps, one after the other:
value tables in groups of 1, 2 and 4; dense parameters whole (DDP), split (FSDP2) and under DeepSpeed's ZeRO
1, 2 and 3; rows exchanged one by one (sparse), and all of them (dense). Each process takes its share of the
rows of the same batches, so that all train the same. Printed is the largest relative difference of the loss
of any step; the bar is 1e-5, in fp32.
"""

import argparse
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

import memlm
from benchmarks.measure import machine, versions
from data_modules.synthetic_facts import SyntheticFacts
from memlm.memory import MemoryConfig, PEERConfig
from memlm.memory.pool import values_without_memory
from memlm.optim import OptimizerConfig, ScheduleConfig, ValuesOptimizerConfig
from memlm.parallel.strategy import MemoryDDPStrategy, MemoryParallelStrategy
from memlm.trainer_rules import TRAINER_DEFAULTS, quiet
from memlm.transformer import MoEConfig, TransformerConfig

ROOT = Path(__file__).resolve().parent.parent
BAR, STEPS, ROWS = 1e-5, 20, 8
SHARES = {"sparse": 2.0, "dense": 0.0}
"""Share of touched rows above which all are sent."""
SPLITS_VALUES, SPLITS_EXPERTS = "memory_group", "expert_group"

_MEMORY: dict[str, Any] = {"half_keys": 12, "heads": 2, "reads": 4, "key_dim": 8, "kernels": "reference"}
_CONSTANT = ScheduleConfig(shape="constant")
_OPTIONS: dict[str, Any] = {
    "transformer": TransformerConfig(16, 3, 2, feed_forward_dim=32),
    "optimizer": OptimizerConfig(learning_rate=0.005, schedule=_CONSTANT),
}
_VALUES = ValuesOptimizerConfig(learning_rate=0.01, schedule=_CONSTANT)


def model_of(name: str, vocab_size: int) -> memlm.LanguageModel:
    """One of the models, with its initial values."""
    if name == "Memory+":
        memory = MemoryConfig(**_MEMORY, layers=[0, 2])
        return memlm.MemoryLM(vocab_size, memory=memory, values_optimizer=_VALUES, **_OPTIONS)
    if name == "PEER":
        peer = PEERConfig(**_MEMORY, layers=[1])
        return memlm.PEERLM(vocab_size, memory=peer, values_optimizer=_VALUES, **_OPTIONS)
    moe = MoEConfig(experts=4, routing="token_choice", top_k=2, normalise_weights=True, expert_dim=16)
    return memlm.MoELM(vocab_size, moe=moe, **_OPTIONS)


MODELS = ("Memory+", "PEER", "MoE")


def strategies() -> dict[str, tuple[type, dict[str, Any]]]:
    """Classes and options by name; those of DeepSpeed only where it is installed."""
    found: dict[str, tuple[type, dict[str, Any]]] = {
        "DDP": (MemoryDDPStrategy, {}),
        "FSDP2": (MemoryParallelStrategy, {}),
    }
    if importlib.util.find_spec("deepspeed") is not None:
        from memlm.parallel.deepspeed_strategy import MemoryDeepSpeedStrategy

        found |= {f"ZeRO {stage}": (MemoryDeepSpeedStrategy, {"stage": stage}) for stage in (1, 2, 3)}
    return found


def cases(ranks: int, models: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """All that so many processes can do."""
    groups = [group for group in (1, 2, 4) if ranks % group == 0]
    for model in models:
        for name, (kind, _) in strategies().items():
            split = SPLITS_EXPERTS if model == "MoE" else SPLITS_VALUES
            splits = split in inspect.signature(kind.__init__).parameters  # type: ignore[misc]
            for group in groups if splits else [1]:
                # Without replicas no rows are exchanged, and experts have none.
                ways = list(SHARES) if split == SPLITS_VALUES and group < ranks else ["-"]
                for way in ways:
                    yield {"model": model, "strategy": name, "group": group, "rows": way}


class Losses(Callback):
    """Keeps the loss of every step, over all ranks."""

    def __init__(self, share: float | None = None) -> None:
        self.share, self.of_steps = share, []  # type: ignore[var-annotated]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for pool in pl_module.pools.values():
            merging = pool.gradient.merging
            if self.share is not None and merging is not None:
                merging.merge_whole_above = merging.share_whole_above = self.share

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *others: Any) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.of_steps.append(float(loss))


def fit(model: str, ranks: int, strategy: Any, share: float | None = None) -> list[float]:
    """The losses of all steps."""
    seed_everything(0, verbose=False)
    data = SyntheticFacts(people=40, name_vocabulary=20, batch_size=ROWS // ranks)
    if strategy == "auto":
        module = model_of(model, data.vocab_size)
    else:
        with values_without_memory():
            module = model_of(model, data.vocab_size)
    losses = Losses(share)
    options = TRAINER_DEFAULTS | {"limit_val_batches": 0, "max_steps": STEPS, "gradient_clip_val": 1.0}
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(module, data)
    return losses.of_steps


def work(models: tuple[str, ...], only: tuple[str, ...]) -> None:
    """In each process: all cases; rank 0 prints JSON, a line a case."""
    quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ:
        print(json.dumps({model: fit(model, 1, "auto") for model in models}), flush=True)
        return
    kinds = strategies()
    for case in cases(ranks, models):
        if only and case["strategy"] not in only:
            continue
        kind, options = kinds[case["strategy"]]
        split = SPLITS_EXPERTS if case["model"] == "MoE" else SPLITS_VALUES
        if split in inspect.signature(kind.__init__).parameters:  # type: ignore[misc]
            options = options | {split: case["group"]}
        start = time.monotonic()
        losses = fit(case["model"], ranks, kind(**options), SHARES.get(case["rows"]))
        if rank == 0:
            seconds = round(time.monotonic() - start, 1)
            print(json.dumps({"ranks": ranks, **case, "seconds": seconds, "losses": losses}), flush=True)


def launch(ranks: int | None, models: tuple[str, ...], only: tuple[str, ...]) -> list[Any]:
    """What the first of so many processes prints; None: of one without torchrun."""
    words = [sys.executable]
    if ranks is not None:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(Path(__file__).resolve()), "--work", "--models", *models]
    words += ["--strategies", *only] if only else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=3600)
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def measure(ranks: list[int], models: tuple[str, ...], only: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each case: how far its losses are from those of one process."""
    (expected,) = launch(None, models, only)
    rows = []
    for number in ranks:
        for case in launch(number, models, only):
            pairs = list(zip(case.pop("losses"), expected[case["model"]], strict=True))
            rows.append(case | {"deviation": max(abs(loss - alone) / alone for loss, alone in pairs)})
            print(f"{case} {rows[-1]['deviation']:.1e}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each model, number of processes and size of groups; sparse / dense exchange."""
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    found: dict[tuple[str, int, int], dict[str, list[str]]] = {}
    for row in rows:
        line = found.setdefault((row["model"], row["ranks"], row["group"]), {})
        line.setdefault(row["strategy"], []).append(f"{row['deviation']:.0e}")
    lines = [f"| model | processes | group | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for (model, ranks, group), line in found.items():
        cells = [" / ".join(line.get(name, ["-"])) for name in names]
        lines.append(f"| {model} | {ranks} | {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if a case is above the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--strategies", nargs="+", default=[], help="names in the table's head; default: all")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    models, only = tuple(options.models), tuple(options.strategies)
    if options.work:
        work(models, only)
        return 0
    rows = measure(options.ranks, models, only)
    worst = max(row["deviation"] for row in rows)
    print(table(rows))
    print(f"\n{len(rows)} cases, {STEPS} steps each; the largest deviation is {worst:.1e}, the bar {BAR:.0e}")
    if options.json:
        content = {"bar": BAR, "steps": STEPS, "rows": rows, "worst": worst}
        content |= {"machine": machine(torch.device("cpu")), "versions": versions()}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if worst <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
