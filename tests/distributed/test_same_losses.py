"""Losses, and the tables after them, are those of one process, for any number of ranks and size of groups."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("steps.py")

SMALL = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8}
CASES = {
    "plain": {},
    "two layers": {"memory": SMALL | {"layers": [0, 2]}},
    "two pools": {"memory": SMALL | {"layers": [0, 2], "layer_pools": ["a", "b"]}},
    "accumulated": {"accumulate": 2, "steps": 8},
    "not clipped": {"clip": None},
    "clipped together": {"values": {"clip": "global"}, "clip": 0.5},
    "clipped apart": {"values": {"clip": 0.01}},
    "row-wise": {"values": {"method": "adamw_rowwise"}},
    "sgd": {"values": {"method": "sgd"}},
    "caught up": {"values": {"moments": "caught_up"}},
    "decay": {"values": {"weight_decay": 0.1}, "settle": True},
    "bf16": {"memory": SMALL | {"layers": [1], "values_dtype": "bfloat16"}},
    "bf16, masters": {
        "memory": SMALL | {"layers": [1], "values_dtype": "bfloat16"},
        "values": {"rounding": "master"},
    },
    "peer": {"kind": "peer", "memory": SMALL | {"layers": [1, 2]}},
    "expanded": {"memory": SMALL | {"half_keys": 8, "layers": [1], "value_expansion": 4}},
    # In its 20th step two scores are equal but for rounding, which decides what one token reads.
    "beside": {"memory": SMALL | {"layers": [0, 2], "mode": "beside"}, "steps": 19},
    "peer beside": {"kind": "peer", "memory": SMALL | {"layers": [1, 2], "mode": "beside", "gate": "silu"}},
    "peer beside, expanded": {
        "kind": "peer",
        "memory": SMALL
        | {"half_keys": 8, "layers": [1], "mode": "beside", "value_expansion": 2, "projection": True},
    },
    "tucker": {"memory": SMALL | {"layers": [1]}, "tucker": True},
    "checkpointed": {
        "memory": SMALL | {"layers": [0, 2], "mode": "beside"},
        "checkpoint": True,
        "accumulate": 2,
        "steps": 8,
    },
    "checkpointed peer": {
        "kind": "peer",
        "memory": SMALL | {"layers": [1, 2], "query_norm": "none"},
        "checkpoint": True,
    },
    "engram": {"kind": "engram", "memory": {"slots": 300, "heads": 2, "layers": [1], "value_dim": 8}},
}
# Stochastic rounding turns a difference in the last bit of a sum into one of 2^-8, now and then.
TOLERANCES = {"bf16": 2e-3, "bf16, masters": 2e-3}


def run(options, ranks):
    words = [sys.executable, str(SCRIPT), json.dumps(options)]
    if "group" in options:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def expected():
    return run({"cases": CASES}, 1)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "group"),
    [
        (1, 1),
        (2, 1),
        (2, 2),
        (4, 2),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(4, 4, marks=pytest.mark.slow),
    ],
)
def test_as_one_process(expected, ranks, group):
    found = run({"group": group, "cases": CASES}, ranks)
    for name, losses in expected.items():
        assert found[name] == pytest.approx(losses, rel=TOLERANCES.get(name, 1e-5)), name
