"""A run that was stopped and continued is the run that was never stopped, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from memlm.run_metrics import read_metrics

NOISE = "--trainer.callbacks+=toy_callbacks.Noise"


def same_state(left: Path, right: Path) -> None:
    """Asserts that weights, moments, schedule, random state and data position agree exactly."""
    a, b = (torch.load(path, weights_only=True) for path in (left, right))
    for key in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "random_state",
        "tokens_seen",
        "SyntheticFacts",
    ):
        assert_equal(a[key], b[key], key)
    assert a["global_step"] == b["global_step"]


def assert_equal(a, b, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{index}")
    else:
        assert a == b, where


def rows(run: str) -> list[dict[str, float]]:
    return read_metrics(Path("runs", run, "metrics.csv"))


# Another max_steps would stretch the schedule, so runs that are cut short by max_steps keep their rates
# constant.
CONSTANT = (
    "--model.optimizer.schedule.shape",
    "constant",
    "--model.values_optimizer.schedule.shape",
    "constant",
)


@pytest.mark.parametrize("stop", [6, 8])
def test_stopping_and_continuing_changes_nothing(memlm, stop):
    """Stopped between validations (6) and right after one (8), where Lightning restarts differently."""
    command = ("fit", "--config", "tiny.yaml", NOISE, *CONSTANT)
    assert memlm(*command, "--run.name", "whole") == 0
    assert memlm(*command, "--run.name", "cut", "--trainer.max_steps", str(stop)) == 0
    assert memlm(*command, "--run.name", "cut", "--ckpt_path", "last") == 0
    assert rows("cut") == rows("whole")
    assert len(rows("whole")) == 12
    same_state(Path("runs/cut/checkpoints/last.ckpt"), Path("runs/whole/checkpoints/last.ckpt"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_crash_in_mid_epoch(memlm, accumulate):
    command = ("fit", "--config", "tiny.yaml", NOISE, "--trainer.accumulate_grad_batches", str(accumulate))
    assert memlm(*command, "--run.name", "whole") == 0
    crash = ("--trainer.callbacks+=toy_callbacks.Crash", "--trainer.callbacks.step", "7")
    with pytest.raises(RuntimeError, match="crash"):
        memlm(*command, *crash, "--run.name", "cut")
    assert rows("cut")[-1]["step"] == 6
    assert memlm(*command, "--run.name", "cut", "--ckpt_path", "last") == 0
    assert rows("cut") == rows("whole")
    same_state(Path("runs/cut/checkpoints/last.ckpt"), Path("runs/whole/checkpoints/last.ckpt"))


@pytest.mark.parametrize(("step", "saved"), [(6, 6), (8, 4)])
def test_a_terminated_run_continues(memlm, step, saved):
    """Stopped between two steps it loses nothing; in mid-validation (8) it goes back to the one before."""
    command = ("fit", "--config", "tiny.yaml", NOISE)
    assert memlm(*command, "--run.name", "whole") == 0
    terminate = ("--trainer.callbacks+=toy_callbacks.Terminate", "--trainer.callbacks.step", str(step))
    with pytest.raises(SystemExit) as ended:
        memlm(*command, *terminate, "--run.name", "cut")
    assert ended.value.code == 143
    assert torch.load("runs/cut/checkpoints/last.ckpt", weights_only=True)["global_step"] == saved
    assert memlm(*command, "--run.name", "cut", "--ckpt_path", "last") == 0
    assert rows("cut") == rows("whole")
    same_state(Path("runs/cut/checkpoints/last.ckpt"), Path("runs/whole/checkpoints/last.ckpt"))


def test_no_checkpoint_between_accumulated_batches(memlm):
    command = ("fit", "--config", "tiny.yaml", "--trainer.accumulate_grad_batches", "2")
    terminate = ("--trainer.callbacks+=toy_callbacks.Terminate", "--trainer.callbacks.step", "0")
    with pytest.raises(SystemExit):
        memlm(*command, *terminate)
    assert not Path("runs/tiny/checkpoints/last.ckpt").exists()


@pytest.mark.slow
def test_kill_in_mid_epoch(folder):
    """A real SIGKILL, in processes of their own."""
    (folder / "killer.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Kill(Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n"
        "        if trainer.global_step == 7:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (folder / "kill.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "killer.Kill"}]}})
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }

    def memlm(*arguments: str) -> int:
        command = [sys.executable, "-m", "memlm", "fit", "--config", "tiny.yaml", *arguments]
        return subprocess.run(command, env=environment).returncode

    assert memlm("--run.name", "whole") == 0
    assert memlm("--run.name", "cut", "--config", "kill.yaml") == -9
    assert memlm("--run.name", "cut", "--ckpt_path", "last") == 0
    assert rows("cut") == rows("whole")
    same_state(Path("runs/cut/checkpoints/last.ckpt"), Path("runs/whole/checkpoints/last.ckpt"))
