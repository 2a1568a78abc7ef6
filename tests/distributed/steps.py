"""Trains small models for some steps, on one process or several; rank 0 prints the losses as JSON.

    torchrun --nproc_per_node 4 tests/distributed/steps.py '{"group": 2, "cases": {"plain": {}}}'

Each case is trained on the same batches, of which a rank takes every world-th row.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from memlm.memory import EngramConfig, MemoryConfig, PEERConfig, TuckerConfig
from memlm.memory.pool import values_without_memory
from memlm.metrics import summed_loss
from memlm.optim import OptimizerConfig, ValuesOptimizerConfig, clip_gradients, configure
from memlm.parallel.mesh import memory_mesh
from memlm.parallel.placing import place
from memlm.transformer import Transformer, TransformerConfig

CONFIGS = {"memory": MemoryConfig, "peer": PEERConfig, "engram": EngramConfig}
MEMORY = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]}
ROWS, LENGTH, VOCAB = 8, 12, 40


def train(case: dict[str, Any], group: int | None, rank: int, world: int) -> list[float]:
    """Losses of each step, over all ranks; last, the sum of the absolute values of the tables."""
    torch.manual_seed(rank if case.get("seeded_by_rank") else 0)
    plan = CONFIGS[case.get("kind", "memory")](**case.get("memory", MEMORY))
    if case.get("tucker"):
        plan.tucker = TuckerConfig(rank=2)
    config = TransformerConfig(
        16, 3, 2, feed_forward_dim=32, activation_checkpointing=case.get("checkpoint", False)
    )
    if group is None:
        model = Transformer(VOCAB, config, plan)
    else:
        with values_without_memory():
            model = Transformer(VOCAB, config, plan)
        wire = torch.bfloat16 if case.get("wire") else None
        place(model, memory_mesh("cpu", world, group, "group"), torch.device("cpu"), wire_dtype=wire)
        for pool in model.pools.values():
            if (above := case.get("whole_above")) is not None:
                pool.gradient.merging.merge_whole_above = pool.gradient.merging.share_whole_above = above
    optimizer, schedule = configure(
        model.named_parameters(),
        {pool.values: pool.gradient for pool in model.pools.values()},
        OptimizerConfig(learning_rate=0.01),
        ValuesOptimizerConfig(learning_rate=0.01, **case.get("values", {})),
        1000,
    )
    generator = torch.Generator().manual_seed(1)
    micro_batches = case.get("accumulate", 1)
    losses = []
    for _ in range(case.get("steps", 20)):
        total = torch.zeros(())
        optimizer.zero_grad()
        for _ in range(micro_batches):
            tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)[rank::world]
            with torch.autocast("cpu", torch.bfloat16, enabled=case.get("autocast", False)):
                logits = model(tokens[:, :-1])
            loss = summed_loss(logits, tokens[:, 1:]) / tokens[:, 1:].numel() / micro_batches
            loss.backward()
            total += loss.detach()
        clip_gradients(optimizer, case.get("clip", 1.0))
        optimizer.step()
        schedule.step()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    if case.get("settle"):
        optimizer.settle()
    for pool in model.pools.values():
        values = pool.values.detach()
        whole = values.full_tensor() if group is not None else values
        losses.append(whole.float().abs().sum().item())
    return losses


def main(options: dict[str, Any]) -> None:
    """Runs all cases."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    group = options.get("group")
    if group is not None:
        dist.init_process_group("gloo")
    losses = {name: train(case, group, rank, world) for name, case in options["cases"].items()}
    if rank == 0:
        print(json.dumps(losses))
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
