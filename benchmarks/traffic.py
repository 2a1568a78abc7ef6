"""What ranks hold and send, counted in training steps of several processes, beside the formulas.

    python benchmarks/traffic.py --ranks 2 --json benchmarks/results/traffic_2.json

starts so many gloo processes on this machine. Each trains a small model of every kind for a step, and counts
the bytes that torch.distributed is given to send (benchmarks/counting.py) and those of its own tensors.
The formulas are those of ``memlm params`` (memlm/parallel/traffic.py, memlm/rank_memory.py), with the number
of rows that the step has really exchanged; memory is that of the rank that holds most.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from benchmarks.counting import counted
from memlm.memory import EngramConfig, MemoryConfig, MemoryPlan, PEERConfig
from memlm.memory.pool import values_without_memory
from memlm.metrics import summed_loss
from memlm.optim import MemoryAdamW, OptimizerConfig, ValuesOptimizerConfig, clip_gradients, configure
from memlm.optim.row_state import local
from memlm.parallel.expert_traffic import Routed
from memlm.parallel.mesh import memory_mesh
from memlm.parallel.placing import place
from memlm.parallel.traffic import Rows, Traffic, traffic
from memlm.rank_memory import Mesh, RankMemory, rank_memory
from memlm.transformer import MoEConfig, Transformer, TransformerConfig

ROOT = Path(__file__).resolve().parent.parent
VOCAB, SEQUENCES, LENGTH, MICRO_BATCHES = 500, 4, 32, 2
_MEMORY: dict[str, Any] = {"half_keys": 40, "heads": 2, "reads": 8, "key_dim": 16, "kernels": "reference"}
_VALUES: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0.1, "moments": "caught_up"}
MODELS: dict[str, MemoryPlan | None] = {
    "dense": None,
    "Memory": MemoryConfig(**_MEMORY, layers=[1], gate="none", projection=False),
    "few of many rows": MemoryConfig(**_MEMORY | {"half_keys": 128}, layers=[1]),
    "Memory+, 2 layers": MemoryConfig(**_MEMORY, layers=[0, 2]),
    "bf16 values": MemoryConfig(**_MEMORY, layers=[1], values_dtype="bfloat16"),
    "two pools": MemoryConfig(**_MEMORY, layers=[0, 2], layer_pools=["a", "b"]),
    "expanded values": MemoryConfig(**_MEMORY, layers=[1], value_expansion=4),
    "PEER": PEERConfig(**_MEMORY, layers=[1]),
    "Engram": EngramConfig(slots=1600, heads=2, layers=[1], value_dim=16, kernels="reference"),
}

NARROW = ("few of many rows", "Memory+, 2 layers", "bf16 values", "PEER", "Engram")
"""Of these, also measured with bf16 on the wire."""

EACH_BATCH = ("dense", "Memory+, 2 layers")
"""Of these, also measured with dense gradients sent after every micro-batch."""

EXPERTS: dict[str, MoEConfig] = {
    "experts": MoEConfig(experts=8, routing="token_choice", top_k=2, expert_dim=32),
    "few experts, shared": MoEConfig(
        experts=8, routing="token_choice", top_k=1, expert_dim=32, shared_experts=1, layers=[0, 2]
    ),
    "experts, Memory+": MoEConfig(experts=16, expert_dim=16),
}
"""Models with experts; the last has a memory too."""


def build(plan: MemoryPlan | None, moe: MoEConfig | None = None) -> Transformer:
    """A model whose values take no memory yet."""
    torch.manual_seed(0)
    with values_without_memory():
        return Transformer(VOCAB, TransformerConfig(64, 3, 4, feed_forward_dim=96), plan, moe)


def optimizer_of(model: Transformer) -> MemoryAdamW:
    """Over all parameters of a model."""
    gradients = {pool.values: pool.gradient for pool in model.pools.values()}
    options = ValuesOptimizerConfig(**_VALUES)
    return configure(model.named_parameters(), gradients, OptimizerConfig(), options, 10)[0]


def measure(
    plan: MemoryPlan | None, mesh: Mesh, rank: int, moe: MoEConfig | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Counted and calculated bytes of one rank in one step."""
    model, twin = build(plan, moe), build(plan, moe).to("meta")
    of_values = memory_mesh("cpu", mesh.ranks, mesh.memory_group, "--memory_group")
    place(
        model,
        of_values,
        torch.device("cpu"),
        expert_group=mesh.expert_group,
        wire_dtype=mesh.wire_dtype,
    )
    chosen = {index: torch.zeros(layer.config.experts) for index, layer in model.experts.items()}
    for index, layer in model.experts.items():
        layer.observers.append(chosen[index].add_)
    optimizer = optimizer_of(model)
    generator = torch.Generator().manual_seed(rank)
    optimizer.zero_grad()
    split = [module for module in model.modules() if isinstance(module, FSDPModule)]
    whole_gradients = 0
    with counted() as passes:
        for batch in range(MICRO_BATCHES):
            last = batch == MICRO_BATCHES - 1
            for module in split:  # as the strategy's block_backward_sync
                module.set_requires_gradient_sync(last or not mesh.whole_gradients, recurse=False)
            tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
            summed_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
            if not last:
                whole_gradients = _bytes(_kept_whole(split))
    read = {name: pool.gradient.compact() for name, pool in model.pools.items()}
    own_rows = {
        name: sums.rows[: len(sums.rows) if sums.count is None else int(sums.count)].clone()
        for name, sums in read.items()
    }
    buffers = [local(sums.sums) for sums in read.values()]
    with counted() as step:
        clip_gradients(optimizer, 1.0)
        finals = {name: len(pool.gradient.final().rows) for name, pool in model.pools.items()}
        optimizer.step()
    rows = {}
    for name, pool in model.pools.items():
        exchange = pool.gradient.merging
        elsewhere = (own_rows[name] < exchange.first) | (own_rows[name] >= exchange.first + exchange.rows)
        most = torch.tensor([len(own_rows[name]), finals[name]])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=exchange.replicas)
        rows[name] = Rows(int(most[0]), int(elsewhere.sum()), finals[name], int(most[1]))
    tokens_of_step = SEQUENCES * LENGTH * MICRO_BATCHES
    routed = {index: _routed(counts, mesh, rank) for index, counts in chosen.items()}
    sent = traffic(twin, mesh, tokens_of_step, MICRO_BATCHES, rows, routed=routed)
    held = rank_memory(twin, optimizer_of(twin), mesh, tokens_of_step, MICRO_BATCHES)
    really = _held(model, optimizer, buffers)
    if mesh.whole_gradients:
        really = replace(really, dense_gradients=whole_gradients)
    return {
        "sent": {"formula": _sent(sent), "counted": {"passes": passes.total, "step": step.total}},
        "held": {"formula": held.as_dict(), "counted": really.as_dict()},
    }


def _routed(counts: torch.Tensor, mesh: Mesh, rank: int) -> Routed:
    """Rows that a rank exchanges, of those that every rank has for each expert."""
    of_ranks = counts.new_empty(mesh.ranks, mesh.expert_group, len(counts) // mesh.expert_group)
    dist.all_gather_into_tensor(of_ranks.flatten(), counts)
    place = rank % mesh.expert_group
    of_group = of_ranks[rank - place : rank - place + mesh.expert_group]
    own = float(of_group[place, place].sum())
    return Routed(float(counts.sum()) - own, float(of_group[:, place].sum()) - own)


def _sent(formula: Traffic) -> dict[str, float]:
    step = formula.row_gradients + formula.rows
    return {"passes": formula.total - step, "step": step}


def _held(model: Transformer, optimizer: MemoryAdamW, row_sums: list[torch.Tensor]) -> RankMemory:
    tables = {id(pool.values) for pool in model.pools.values()}
    dense = [p for p in model.parameters() if id(p) not in tables]
    values = [pool.values for pool in model.pools.values()]
    return RankMemory(
        dense_weights=_bytes(dense),
        dense_gradients=_bytes(p.grad for p in dense if p.grad is not None),
        dense_state=_bytes(state for p in dense for state in optimizer.state[p].values()),
        values=_bytes(values),
        row_gradients=_bytes(row_sums),
        values_state=_bytes(state for p in values for state in optimizer.state[p].values()),
    )


def _kept_whole(split: list[FSDPModule]) -> Iterator[torch.Tensor]:
    """Gradients that FSDP2 adds up before it sends them; it shows them nowhere."""
    for module in split:
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                gradient = parameter._unsharded_param.grad
                if gradient is not None:
                    yield gradient


def _bytes(tensors: Any) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def work(groups: list[int]) -> None:
    """In each process: measures all; rank 0 prints JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = []
    for group in groups:
        for name, plan in MODELS.items():
            found: list[Any] = [None] * ranks
            dist.all_gather_object(found, measure(plan, Mesh(ranks, group, True), rank))
            rows.append({"model": name, "ranks": ranks, "memory_group": group, "by_rank": found})
        for name in NARROW:
            found = [None] * ranks
            mesh = Mesh(ranks, group, True, wire_dtype=torch.bfloat16)
            dist.all_gather_object(found, measure(MODELS[name], mesh, rank))
            rows.append(
                {"model": f"{name}, bf16 sent", "ranks": ranks, "memory_group": group, "by_rank": found}
            )
        for name in EACH_BATCH:
            found = [None] * ranks
            mesh = Mesh(ranks, group, True, whole_gradients=False)
            dist.all_gather_object(found, measure(MODELS[name], mesh, rank))
            rows.append(
                {"model": f"{name}, each batch", "ranks": ranks, "memory_group": group, "by_rank": found}
            )
        for name, moe in EXPERTS.items():
            plan = MODELS["Memory+, 2 layers"] if name == "experts, Memory+" else None
            found = [None] * ranks
            mesh = Mesh(ranks, ranks, True, expert_group=group)
            dist.all_gather_object(found, measure(plan, mesh, rank, moe))
            name = f"{name}, split over {group}"
            rows.append({"model": name, "ranks": ranks, "memory_group": ranks, "by_rank": found})
    if rank == 0:
        print(json.dumps(rows))
    dist.destroy_process_group()


def launch(ranks: int, groups: list[int]) -> list[dict[str, Any]]:
    """Starts the processes and returns what rank 0 has printed."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(Path(__file__).resolve()), "--work", *map(str, groups)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Bytes of rank 0, and the largest difference of any rank."""
    lines = ["| model | ranks | G | sent in passes | formula | sent in step | formula | largest difference |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        first = row["by_rank"][0]["sent"]
        cells = [
            f"{first[kind][part]:,.0f}" for part in ("passes", "step") for kind in ("counted", "formula")
        ]
        worst = max(difference(rank["sent"], part) for rank in row["by_rank"] for part in ("passes", "step"))
        place = [row["model"], str(row["ranks"]), str(row["memory_group"])]
        lines.append("| " + " | ".join([*place, *cells, f"{worst:.2%}"]) + " |")
    return "\n".join(lines)


def difference(sent: dict[str, dict[str, float]], part: str) -> float:
    """Of counted and calculated bytes, relative."""
    real, formula = sent["counted"][part], sent["formula"][part]
    return abs(real - formula) / max(real, formula, 1)


def main() -> None:
    """Measures all models in groups of every size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes [2]")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--work", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    rows = launch(options.ranks, [g for g in range(1, options.ranks + 1) if options.ranks % g == 0])
    print(table(rows))
    if options.json:
        command = " ".join(["python benchmarks/traffic.py", *sys.argv[1:]])
        content = {"command": command, "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
