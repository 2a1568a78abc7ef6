"""Ranks that save small checkpoints in several ways, and check what is there; run by torchrun.

torchrun --nproc_per_node 2 tests/distributed/saving.py FOLDER
"""

import resource
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from memlm.errors import CheckpointError
from memlm.parallel.background_save import BackgroundSave
from memlm.parallel.checkpoint_folder import Snapshot, read_whole, save


def main(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    own = torch.arange(12.0).view(3, 4) + 100 * rank
    split = DTensor.from_local(own, mesh, [Shard(1)], run_check=False)
    expected = split.full_tensor().clone()
    steps = []

    def checkpoint():
        return {"state_dict": {"values": split}, "global_step": 1, "loops": {"steps": steps}}

    save(checkpoint(), folder / "first")
    assert torch.equal(read_whole(folder / "first")["state_dict"]["values"], expected)

    # Training goes on while it is written: tensors and all else are as they were.
    dist.barrier()
    group = dist.new_group(backend="gloo")
    snapshot = Snapshot(checkpoint(), copy=True)
    may_write = time.monotonic() + 1

    def write():
        time.sleep(max(0, may_write - time.monotonic()))
        snapshot.write(folder / "first", group)

    saving = BackgroundSave(write)
    steps.append(7)
    for _ in range(50):
        own += 1
        dist.all_reduce(torch.ones(10))
    assert not saving.placed
    saving.wait()
    found = read_whole(folder / "first")
    assert torch.equal(found["state_dict"]["values"], expected)
    assert found["loops"] == {"steps": []}

    # What cannot be written is said on all ranks; what was there is there.
    dist.barrier()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for attempt in (
        partial(save, checkpoint(), folder / "first"),
        partial(Snapshot(checkpoint()).write, folder / "first", group),
    ):
        if rank == 1:  # as where its disk is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        said = failure(attempt)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert said.startswith(f"{folder}/first: cannot be written: rank 1: "), said
    own_folder = folder / f"node {rank}"  # no file system that nodes share
    said = failure(partial(save, checkpoint(), own_folder / "first"))
    assert f"lacks __1_0.distcp, which another process has written: all nodes must share {folder}" in said
    assert not (own_folder / "first").exists()
    assert torch.equal(read_whole(folder / "first")["state_dict"]["values"], expected)

    # What a single device has left in the way is removed.
    if rank == 0:
        (folder / ".first.tmp").write_text("in the way")
    dist.barrier()
    save(checkpoint(), folder / "first")
    assert torch.equal(read_whole(folder / "first")["state_dict"]["values"], split.full_tensor())
    dist.barrier()
    print("good", flush=True)
    dist.destroy_process_group()


def failure(attempt):
    """What is said of a checkpoint that cannot be written; the same on all ranks."""
    try:
        attempt()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("nothing was raised")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
