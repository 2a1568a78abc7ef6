"""Trains small mixtures of experts, on one process or several; rank 0 prints what comes of it as JSON.

    torchrun --nproc_per_node 4 tests/distributed/expert_steps.py '{"groups": [1, 2], "cases": {"plain": {}}}'

Each case is trained on the same batches, of which a rank takes every world-th row; experts are split over
groups of each size. With ``folder``, checkpoints go from one size of group to the others.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from memlm.memory import MemoryConfig
from memlm.memory.pool import values_without_memory
from memlm.metrics import summed_loss
from memlm.optim import MemoryAdamW, OptimizerConfig, ValuesOptimizerConfig, clip_gradients, configure
from memlm.optim.schedule import Schedule
from memlm.parallel import checkpoint_folder
from memlm.parallel.mesh import memory_mesh
from memlm.parallel.placing import place
from memlm.transformer import MoEConfig, Transformer, TransformerConfig

ROWS, LENGTH, VOCAB = 8, 12, 40
MEMORY: dict[str, Any] = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8, "kernels": "reference"}
Trained = tuple[Transformer, MemoryAdamW, Schedule]


def build(case: dict[str, Any], group: int | None) -> Trained:
    """A model, whose experts are split over groups of a size if there is one, and its optimizer."""
    torch.manual_seed(0)
    plan = MemoryConfig(**MEMORY, layers=[1]) if case.get("memory") else None
    moe = MoEConfig(**{"experts": 8, "routing": "token_choice", "top_k": 2, "expert_dim": 16} | case["moe"])
    recomputed = case.get("recomputed", False)
    config = TransformerConfig(16, 3, 2, feed_forward_dim=32, activation_checkpointing=recomputed)
    if group is None:
        model = Transformer(VOCAB, config, plan, moe)
        if case.get("double"):
            model.double()
    else:
        world = dist.get_world_size()
        with values_without_memory():
            model = Transformer(VOCAB, config, plan, moe)
        dtype = torch.float64 if case.get("double") else None
        mesh = memory_mesh("cpu", world, world, "group")
        place(model, mesh, torch.device("cpu"), dtype=dtype, expert_group=group)
    gradients = {pool.values: pool.gradient for pool in model.pools.values()}
    options = OptimizerConfig(learning_rate=0.01, weight_decay=0.1)
    optimizer, schedule = configure(
        model.named_parameters(), gradients, options, ValuesOptimizerConfig(learning_rate=0.01), 1000
    )
    return model, optimizer, schedule


def train(trained: Trained, case: dict[str, Any], steps: int, seed: int = 1) -> list[float]:
    """Losses of each step, over all ranks."""
    model, optimizer, schedule = trained
    several = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    generator = torch.Generator().manual_seed(seed)
    micro_batches, slices = case.get("accumulate", 1), 1 if several else case.get("slices", 1)
    losses = []
    for _ in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        optimizer.zero_grad()
        for number in range(micro_batches):
            tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
            # Rows that begin alike, or with a token twice, have equal scores there: the last bit would decide
            # which of the tokens an expert takes.
            tokens[:, :2] = torch.randperm(VOCAB, generator=generator)[: 2 * ROWS].view(ROWS, 2)
            if case.get("alike"):  # all go to the same experts, and other ranks have nothing to do
                tokens = tokens[:1, :1].expand(ROWS, LENGTH + 1)
            for module in model.modules():
                if case.get("sent_once") and isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(number == micro_batches - 1, recurse=False)
            for part in range(slices):
                own = tokens[rank + part :: world * slices]
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.get("autocast", False)):
                    loss = summed_loss(model(own[:, :-1]), own[:, 1:]) / own[:, 1:].numel()
                    extra = [layer.take_losses().values() for layer in model.experts.values()]
                loss = loss + sum(sum(of_layer) for of_layer in extra) / len(extra)
                loss = loss / (micro_batches * slices)
                loss.backward()
                total += loss.detach()
        for layer in model.experts.values():
            layer.balance(partial(_sum, several))
        clip_gradients(optimizer, case.get("clip", 1.0))
        optimizer.step()
        schedule.step()
        losses.append(_sum(several, total).item() / world)
    return losses


def _sum(several: bool, x: Tensor) -> Tensor:
    total = x.clone()
    if several:
        dist.all_reduce(total)
    return total


def sums(model: Transformer) -> dict[str, float]:
    """The sum of the absolute values of every parameter and buffer."""
    found = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = whole.detach().double().abs().sum().item()
    return found


def run(case: dict[str, Any], group: int | None) -> dict[str, Any]:
    """Losses, and the parameters after them."""
    trained = build(case, group)
    first = sums(trained[0])
    losses = train(trained, case, case.get("steps", 20))
    return {"first": first, "losses": losses, "last": sums(trained[0])}


def go_to(schedule: Schedule, step: int) -> None:
    """The learning rates after so many steps."""
    for _ in range(step):
        schedule.step()


def round_trip(folder: Path, groups: list[int]) -> dict[str, Any]:
    """Losses of some steps, of which the second half goes on from a checkpoint of the first."""
    case: dict[str, Any] = {"moe": {"balance_rate": 0.01}, "memory": True}
    found: dict[str, Any] = {}
    for group in groups:
        trained = build(case, group)
        train(trained, case, 3)
        checkpoint = {
            "state_dict": trained[0].state_dict(),
            "optimizer_states": [checkpoint_folder.optimizer_state(trained[0], trained[1])],
        }
        checkpoint_folder.save(checkpoint, folder / f"from_{group}")
        whole = checkpoint_folder.save_file(checkpoint)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"from_{group}.pt")
        dist.barrier()
        found[f"{group} on"] = train(trained, case, 3, seed=2)
        for other in groups:
            for name in (f"from_{group}", f"from_{group}.pt"):
                fresh = build(case, other)
                checkpoint_folder.load(folder / name, fresh[0], [fresh[1]], True)
                go_to(fresh[2], 3)
                found[f"{name} to {other}"] = train(fresh, case, 3, seed=2)
    return found


def go_on_alone(folder: Path, groups: list[int]) -> dict[str, Any]:
    """The same on one process, from the checkpoints of several."""
    case: dict[str, Any] = {"moe": {"balance_rate": 0.01}, "memory": True}
    found = {}
    for group in groups:
        content = checkpoint_folder.read_whole(folder / f"from_{group}")
        trained = build(case, None)
        trained[0].load_state_dict(content["state_dict"])
        trained[1].load_state_dict(content["optimizer_states"][0])
        go_to(trained[2], 3)
        found[f"from_{group} to one process"] = train(trained, case, 3, seed=2)
    return found


def main(options: dict[str, Any]) -> None:
    """Runs all cases."""
    several = "WORLD_SIZE" in os.environ
    if several:
        dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, case in options["cases"].items():
        groups = options["groups"] if several else [None]
        found[name] = {str(group): run(case, group) for group in groups}
    if "folder" in options:
        folder = Path(options["folder"])
        found["round trip"] = (round_trip if several else go_on_alone)(folder, options["groups"])
    if not several or dist.get_rank() == 0:
        print(json.dumps(found))
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
