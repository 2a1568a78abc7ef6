"""Experts split over groups: losses and parameters are those of one process, checkpoints fit any group."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import CONFIG, ONE, TWO, Place

SCRIPT = Path(__file__).with_name("expert_steps.py")
CASES = {
    "token choice": {"moe": {}},
    "normalised": {"moe": {"normalise_weights": True}, "steps": 10},
    "balance rate": {"moe": {"balance_rate": 0.01, "score": "sigmoid"}},
    "z loss": {"moe": {"z_loss": 0.01}, "steps": 10},
    "shared experts": {"moe": {"shared_experts": 1}, "steps": 10},
    "beside memory": {"moe": {}, "memory": True},
    "accumulated": {"moe": {}, "accumulate": 2, "steps": 8},
    "accumulated, sent once": {"moe": {}, "accumulate": 2, "steps": 8, "sent_once": True},
    "recomputed": {"moe": {}, "recomputed": True, "steps": 5},
    # In double precision: where scores are close, or gradients near zero, the last bit of a float decides.
    "one expert a token": {"moe": {"top_k": 1}, "clip": None, "double": True, "steps": 10},
    "idle ranks": {"moe": {"top_k": 1}, "alike": True, "double": True, "steps": 10},
    # These depend on which tokens are on one rank: the one process takes them in as many slices.
    "auxiliary loss": {"moe": {"auxiliary_loss": 0.01}, "sliced": True, "double": True, "steps": 10},
    "expert choice": {"moe": {"routing": "expert_choice"}, "sliced": True, "double": True, "steps": 10},
    # A sum in another order may round to another bf16.
    "autocast": {"moe": {}, "autocast": True, "steps": 5},
}
TOLERANCES = {name: 1e-9 for name, case in CASES.items() if "double" in case} | {"autocast": 1e-2}


def run(options, ranks=None):
    words = [sys.executable, str(SCRIPT), json.dumps(options)]
    if ranks is not None:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "groups"), [(2, [2]), pytest.param(4, [2, 4], marks=pytest.mark.slow)])
def test_as_one_process(ranks, groups):
    cases = {name: case | ({"slices": ranks} if "sliced" in case else {}) for name, case in CASES.items()}
    expected, found = run({"cases": cases}), run({"groups": groups, "cases": cases}, ranks)
    for name in CASES:
        for group in groups:
            ours, theirs = found[name][str(group)], expected[name]["None"]
            tolerance = TOLERANCES.get(name, 1e-5)
            assert ours["first"] == theirs["first"]
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance), name
            assert ours["last"] == pytest.approx(theirs["last"], rel=tolerance), name


@pytest.mark.distributed
def test_a_checkpoint_fits_groups_of_any_size(tmp_path):
    groups = [1, 2, 4]
    found = run({"groups": groups, "cases": {}, "folder": str(tmp_path)}, 4)["round trip"]
    alone = run({"groups": groups, "cases": {}, "folder": str(tmp_path)})["round trip"]
    assert len(found) == 3 + 3 * 3 * 2 and len(alone) == 3
    for group in groups:
        # The same numbers of ranks and sizes of groups add up in the same order.
        assert found[f"from_{group} to {group}"] == found[f"{group} on"]
        assert found[f"from_{group}.pt to {group}"] == found[f"{group} on"]
    for name, losses in (found | alone).items():
        assert losses == pytest.approx(found["1 on"], rel=1e-5), name


@pytest.mark.distributed
def test_from_the_command_line(tmp_path):
    model = {
        "class_path": "memlm.MoELM",
        "init_args": {
            "transformer": {"dim": 16, "layers": 2, "heads": 2},
            "moe": {
                "experts": 4,
                "routing": "token_choice",
                "top_k": 2,
                "expert_dim": 8,
                "balance_rate": 0.01,
            },
            "optimizer": {"learning_rate": 0.005, "schedule": {"shape": "constant"}},
        },
    }
    place = Place(tmp_path, CONFIG | {"model": model})
    place.run("fit", "one", *ONE, "--trainer.callbacks+=ExpertLoad")
    split = [*TWO, "--trainer.strategy.init_args.expert_group"]
    half = [*split, "2", "--trainer.max_steps", "6", "--trainer.callbacks+=ExpertLoad"]
    place.run("fit", "two", *half)
    place.run("fit", "goes_on", *ONE, "--ckpt_path", str(place.checkpoint("two")))
    for column in ("train/loss", "val/loss", "train/gradient_norm_dense"):
        found = place.column("two", column) + place.column("goes_on", column)
        assert found == pytest.approx(place.column("one", column), rel=1e-5), column
    said = place.run("fit", "refused", *split, "3", code=2)
    errors = [line for line in said.splitlines() if "error" in line]
    assert errors == [
        "memlm: error: trainer.strategy.init_args.expert_group: is 3, must divide the number of processes (2)"
    ]
