"""Ranks that sum in a loop until one of them ends in some way; the others say what they learn of it.

    RANK=0 WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 \\
        python tests/distributed/dying.py '{"how": "kill", "who": 1}'
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from memlm.parallel import watch as module


def main(options: dict[str, Any]) -> None:
    """One rank."""
    module.PATIENCE = options.get("patience", module.PATIENCE)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    watch = module.Watch(rank, world, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        for step in range(20):
            if rank == options["who"] and step == 5:
                end(options["how"], watch)
            dist.all_reduce(torch.ones(1000))
            time.sleep(0.05)
    except Exception as error:
        print(f"explained: {watch.explain(error)}", flush=True)
        watch.stop()
        raise
    watch.stop()
    print("done", flush=True)


def end(how: str, watch: module.Watch) -> None:
    """One of the ways."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "raise":
        raise ValueError("a shard is missing")
    elif how == "refuse":  # and takes its time to end: the others do not learn it from a closed connection
        print(f"said: {watch.refuse('a shard is missing')} {watch.refuse('a shard is missing')}", flush=True)
        watch.stop()
        time.sleep(module.GRACE_AFTER_REFUSAL + 4)
        sys.exit(2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
