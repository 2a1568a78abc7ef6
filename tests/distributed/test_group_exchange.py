"""Collectives of a memory group and their gradients, and what runs while they are under way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("group_exchange_ranks.py")

ORDERS = {
    # Slots and weights; answers. Backward: answers' gradient; weights' gradient.
    "replace": [
        *("begin", "begin", "gate", "wait", "wait", "begin", "wait"),
        *("begin", "wait", "begin", "gate, backward", "wait"),
    ],
    "beside": [
        *("begin", "begin", "feed-forward", "wait", "wait", "begin", "gate", "wait"),
        *("begin", "gate, backward", "wait", "begin", "feed-forward, backward", "wait"),
    ],
    # Slots and hidden states; products; weights; answers. Backward all but the slots.
    "peer beside": [
        *("begin", "begin", "feed-forward", "wait", "wait", "begin", "gate", "wait"),
        *("begin", "wait", "begin", "wait"),
        *("begin", "wait", "begin", "wait"),
        *("begin", "gate, backward", "wait", "begin", "feed-forward, backward", "wait"),
    ],
}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_results_gradients_and_what_runs_while_they_are_under_way(ranks):
    # Three ranks do not divide the values of the block, whose order is looked at on two.
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEMLM_KERNELS": "reference"}
    done = subprocess.run([*words, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == (ORDERS if ranks == 2 else {})
