"""Row gradients and updated rows among ranks, row by row and whole, are those of sums in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]}
CASES = {
    "plain": {},
    "decay": {"values": {"weight_decay": 0.1}, "settle": True},
    "clipped together": {"values": {"clip": "global"}, "clip": 0.5},
    "few rows": {"memory": SMALL | {"half_keys": 40}},
    "seeded by rank": {"seeded_by_rank": True},
    "row-wise, caught up": {"values": {"method": "adamw_rowwise", "moments": "caught_up"}},
}


def run(script, options, ranks=None):
    words = [sys.executable, str(HERE / script), json.dumps(options)]
    if ranks is not None:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "MEMLM_KERNELS": "reference",
    }
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "group"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_sums_and_rows_of_all_ranks(ranks, group):
    assert run("exchange_ranks.py", {"group": group}, ranks) == "ok 192"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "group"),
    [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_losses_either_way(ranks, group):
    expected = json.loads(run("steps.py", {"cases": CASES}))
    for above in (0.0, 2.0):
        cases = {name: case | {"whole_above": above} for name, case in CASES.items()}
        found = json.loads(run("steps.py", {"group": group, "cases": cases}, ranks))
        for name, losses in expected.items():
            assert found[name] == pytest.approx(losses, rel=1e-5), (name, above)
