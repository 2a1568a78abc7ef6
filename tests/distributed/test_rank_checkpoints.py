"""Checkpoints of several ranks: saved while training goes on, before a machine goes, through kills."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import CONFIG as OF_RUNS

from memlm.parallel.checkpoint_folder import read_whole

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MEMLM_KERNELS": "reference"}
OVERLAY = ROOT / "configs" / "parallel" / "memory_parallel.yaml"
# A save every 4 of 12 steps.
CONFIG = OF_RUNS | {"trainer": OF_RUNS["trainer"] | {"devices": 2, "val_check_interval": 4}}
ASYNCHRONOUS = ["--trainer.strategy.init_args.asynchronous_save", "true"]


def start(folder, name, *words):
    """memlm fit on two processes; its output goes to a file."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"run": {"root": str(folder)}} | CONFIG))
    command = [sys.executable, "-m", "memlm", "fit", "--config", str(config), "--config", str(OVERLAY)]
    command += ["--run.name", name, *words]
    with (folder / f"{name}.txt").open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT)


def fit(folder, name, *words, code=0):
    """The same until its end; what it has printed."""
    process = start(folder, name, *words)
    assert process.wait(timeout=300) == code, (folder / f"{name}.txt").read_text()[-4000:]
    return (folder / f"{name}.txt").read_text()


def tensors(folder, name, which="last"):
    whole = read_whole(folder / name / "checkpoints" / f"{which}.ckpt")
    found = dict(whole["state_dict"])
    for number, state in whole["optimizer_states"][0]["state"].items():
        found |= {f"{number} {kind}": tensor for kind, tensor in state.items()}
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run of 12 steps."""
    folder = tmp_path_factory.mktemp("runs")
    fit(folder, "whole")
    return folder


def test_what_ranks_save_and_refuse(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(__file__).with_name("saving.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("good") == 2


def test_saving_while_training_goes_on(folder):
    fit(folder, "asynchronous", *ASYNCHRONOUS)
    for which in ("last", "best"):
        assert_equal(tensors(folder, "asynchronous", which), tensors(folder, "whole", which))
    for name in ("whole", "asynchronous"):
        checkpoints = folder / name / "checkpoints"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]
        with (folder / name / "checkpoints.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["4", "8", "12"]
        size = sum(file.stat().st_size for file in (checkpoints / "last.ckpt").iterdir())
        assert int(rows[-1]["bytes"]) == size
        assert all(0 < float(row["seconds_waited"]) <= float(row["seconds"]) for row in rows)


def test_needs_a_folder(tmp_path):
    whole = ["--trainer.strategy.init_args.save_distributed_checkpoint", "false"]
    said = fit(tmp_path, "refused", *ASYNCHRONOUS, *whole, code=2)
    assert "trainer.strategy.init_args.asynchronous_save: is true, which needs" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_all_save_when_one_is_told_to_end(folder, rank):
    name, many = f"told_{rank}", ["--trainer.max_steps", "2000", "--trainer.val_check_interval", "1000"]
    words = [*many, *(ASYNCHRONOUS if rank else [])]
    process = start(folder, name, *words)
    metrics, until = folder / name / "metrics.csv", time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert process.poll() is None and time.monotonic() < until, (folder / f"{name}.txt").read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    other = next(int(pid) for pid in children if b"memlm" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill((process.pid, other)[rank], signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, (folder / f"{name}.txt").read_text()[-4000:]
    checkpoint = read_whole(folder / name / "checkpoints" / "last.ckpt")
    rows = metrics.read_text().splitlines()
    assert checkpoint["global_step"] == int(rows[-1].split(",")[0]) >= 4

    # The state is whole: training goes on as if nothing had been.
    step = checkpoint["global_step"]
    ends = ["--trainer.max_steps", str(step + 4), "--trainer.val_check_interval", "1000"]
    fit(folder, name, *ends, "--ckpt_path", "last")
    fit(folder, f"untold_{rank}", *ends)
    assert_equal(tensors(folder, name), tensors(folder, f"untold_{rank}"))


def test_kills(tmp_path):
    """One in a save, one in a step; then one in an asynchronous save."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "3"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "kills.json")], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    result = json.loads((tmp_path / "kills.json").read_text())
    assert [kill["wanted"] for kill in result["kills"]] == ["save", "step", "save"]
    assert [kill["asynchronous"] for kill in result["kills"]] == [False, False, True]
    assert all(kill["named"] for kill in result["kills"])
