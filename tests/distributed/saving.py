"""Ranks that save small checkpoints in several ways, and check what is there; run by torchrun.

torchrun --nproc_per_node 2 tests/distributed/saving.py FOLDER
"""

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
    if rank == 0:
        (folder / ".first.tmp").write_text("in the way")
    dist.barrier()
    for attempt in (partial(save, checkpoint(), folder / "first"), Snapshot(checkpoint()).write):
        try:
            attempt() if isinstance(attempt, partial) else attempt(folder / "first", group)
        except CheckpointError as error:
            assert (
                str(error)
                == f"{folder}/first: cannot be written: [Errno 17] File exists: '{folder}/.first.tmp'"
            )
        else:
            raise AssertionError("nothing was raised")
    assert torch.equal(read_whole(folder / "first")["state_dict"]["values"], expected)
    dist.barrier()
    print("good", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
