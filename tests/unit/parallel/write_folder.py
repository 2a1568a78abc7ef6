"""Trains a small model on all ranks and saves it to a folder; run by torchrun.

    torchrun --nproc_per_node 2 tests/unit/parallel/write_folder.py '{"folder": "x", "group": 2}'

Beside the folder: ``whole.pt``, all tensors as the ranks had them, and the loss of the next step.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from memlm import MemoryLM
from memlm.memory import MemoryConfig
from memlm.memory.pool import values_without_memory
from memlm.metrics import summed_loss
from memlm.optim import OptimizerConfig, ValuesOptimizerConfig, configure
from memlm.parallel import checkpoint_folder
from memlm.parallel.mesh import memory_mesh
from memlm.parallel.placing import place
from memlm.transformer import TransformerConfig

ROWS, LENGTH, VOCAB = 4, 12, 40


def build(options):
    """The model and its optimizer, not yet placed."""
    torch.manual_seed(0)
    sizes = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]}
    return MemoryLM(
        VOCAB,
        transformer=TransformerConfig(16, 2, 2, feed_forward_dim=32, **options.get("transformer", {})),
        memory=MemoryConfig(**sizes | options.get("memory", {})),
    )


def optimizer_of(model, options):
    """As ``configure_optimizers`` makes it."""
    return configure(
        model.named_parameters(),
        {pool.values: pool.gradient for pool in model.pools.values()},
        OptimizerConfig(learning_rate=0.01),
        ValuesOptimizerConfig(learning_rate=0.01, **options.get("values", {})),
        1000,
    )[0]


def step(model, optimizer, seed, rank=0, world=1):
    """One step on this rank's rows of a batch; its loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)[rank::world]
    loss = summed_loss(model(tokens[:, :-1]), tokens[:, 1:]) / tokens[:, 1:].numel()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def main(options):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    with values_without_memory():
        model = build(options)
    place(model.transformer, memory_mesh("cpu", world, options["group"], "group"), torch.device("cpu"))
    optimizer = optimizer_of(model, options)
    for seed in range(options.get("steps", 3)):
        step(model, optimizer, seed, rank, world)
    folder = Path(options["folder"])
    checkpoint = {
        "state_dict": model.state_dict(),
        "optimizer_states": [checkpoint_folder.optimizer_state(model, optimizer)],
        "epoch": 0,
        "global_step": 3,
        "loops": {},
        "lr_schedulers": [{"last_epoch": 3}],
        "random_state": [{"torch": torch.get_rng_state()}] * world,
        "architecture": model.architecture(),
        "tokens_seen": 7,
        "trained": "everything",
    }
    checkpoint_folder.save(checkpoint, folder)
    if options.get("compare", True):
        named = dict(model.named_parameters())
        whole = {
            "state_dict": {name: _whole(tensor) for name, tensor in model.state_dict().items()},
            "state": {
                name: {kind: _whole(tensor) for kind, tensor in optimizer.state[parameter].items()}
                for name, parameter in named.items()
            },
        }
        loss = step(model, optimizer, 100, rank, world)
        dist.all_reduce(loss)
        if rank == 0:
            torch.save(whole | {"loss": loss / world}, folder.parent / "whole.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
