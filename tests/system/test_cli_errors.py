"""Mistakes end in one line that names the key or the file, exit code 2, and leave nothing behind."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from data_modules.synthetic_facts import SyntheticFacts
from memlm.errors import ConfigError, DataError

FIT = ("fit", "--config", "tiny.yaml")


FAILURES = {
    "user": ConfigError("data.x", "is wrong"),
    "ctrl-c": KeyboardInterrupt(),
    "bug": ZeroDivisionError(),
}


class UnreadableFacts(SyntheticFacts):
    """Data whose file turns out to be broken when it is opened."""

    def setup(self, stage: str) -> None:
        raise DataError("facts.jsonl", "is cut off", line=7)


class Failing(Callback):
    """Raises in the middle of training.

    Args:
        kind: What to raise: user, ctrl-c or bug.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 5:
            raise FAILURES[self.kind]


class FailingAtOnce(Callback):
    """Fails after the run directory was made, before anything is trained."""

    def on_train_start(self, *args):
        raise ConfigError("data.x", "is wrong from the start")


@pytest.fixture
def error(memlm, capsys):
    """Runs a command that must fail; returns its one line."""

    def run(*arguments: str) -> str:
        assert memlm(*arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memlm: error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("memlm: error: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--model.transformer.dimm 3", ["model.transformer.dimm", "not an option of MemoryLM"]),
        ("--model.transformer.dim wide", ["model.transformer.dim", "expected int", "wide"]),
        ("--model.memory.reads 9", ["model.memory.reads", "9", "half_keys (8)"]),
        ("--model MemryLM", ["model", "'MemryLM'", "did you mean MemoryLM"]),
        ("--data Facts", ["data", "'Facts'", "SyntheticFacts"]),
        ("--data.peple 3", ["data.peple", "not an option of SyntheticFacts"]),
        (
            "--trainer.callbacks+=LerningRateMonitor",
            ["trainer.callbacks", "did you mean LearningRateMonitor"],
        ),
        ("--config unknown.yaml", ["modle.x", "not an option"]),
        ("--config broken.yaml", ["broken.yaml:2", "not valid YAML"]),
        ("--config absent.yaml", ["config", "absent.yaml", "not exist"]),
        ("--nonsense 3", ["nonsense"]),
        ("--run.name ../up", ["run.name", "'../up'"]),
        ("--trainer.max_steps -1", ["trainer.max_steps", "must be given"]),
        ("--trainer.val_check_interval 0.5", ["trainer.val_check_interval", "0.5", "number of batches"]),
        (
            "--trainer.accumulate_grad_batches 3",
            ["trainer.val_check_interval", "trainer.accumulate_grad_batches 3"],
        ),
        (
            "--trainer.check_val_every_n_epoch 1",
            ["trainer.check_val_every_n_epoch", "trainer.val_check_interval"],
        ),
        ("--trainer.accumulate_grad_batches 0", ["trainer.accumulate_grad_batches", "is 0"]),
        ("--trainer.gradient_clip_val -1", ["trainer.gradient_clip_val", "-1"]),
        ("--trainer.gradient_clip_algorithm value", ["trainer.gradient_clip_algorithm", "must be norm"]),
        ("--trainer.strategy nonsense", ["trainer", "nonsense"]),
        ("--trainer.devices 2", ["trainer.strategy", "is DDPStrategy with 2 processes", "memory_parallel"]),
        (
            "--trainer.devices 2 --trainer.strategy deepspeed",
            ["trainer.strategy", "is DeepSpeedStrategy with 2 processes", "memory_deepspeed"],
        ),
        ("--model.memory.half_keys 10000000", ["model.memory.half_keys", "GiB"]),
        ("--run.root tiny.yaml", ["tiny.yaml", "Not a directory"]),
        ("--trainer.limit_train_batches 2", ["trainer.limit_train_batches", "trainer.max_steps"]),
        ("--trainer.overfit_batches 2", ["trainer.overfit_batches", "trainer.max_steps"]),
        ("--trainer.accelerator gpu", ["gpu"]),
        ("--data test_cli_errors.UnreadableFacts", ["facts.jsonl:7", "is cut off"]),
        ("--ckpt_path last", ["runs/tiny/checkpoints", "holds no checkpoint"]),
        ("--ckpt_path best", ["runs/tiny/checkpoints/best.ckpt", "does not exist"]),
        ("--ckpt_path some.ckpt", ["some.ckpt", "does not exist"]),
        ("--ckpt_path lst", ["lst", "last, best"]),
    ],
)
def test_one_line_and_no_directory(error, folder, arguments, parts):
    (folder / "unknown.yaml").write_text("modle:\n  x: 1\n")
    (folder / "broken.yaml").write_text("a: [1\nb: 2\n")
    message = error(*FIT, *arguments.split())
    for part in parts:
        assert part in message
    assert not Path("runs").exists()


def test_missing_sections(error):
    assert "data, model: needed" in error("fit", "--trainer.max_steps", "3")
    assert "pass --config" in error("test", "--ckpt_path", "last")


def test_evaluation_needs_a_checkpoint(error):
    for verb in ("validate", "test", "predict"):
        assert error(verb, "--config", "tiny.yaml").startswith("ckpt_path: is needed")


def test_users_error_in_mid_training(error, memlm):
    failing = ("--trainer.callbacks+=test_cli_errors.Failing", "--trainer.callbacks.kind")
    assert error(*FIT, *failing, "user") == "data.x: is wrong"
    environment = json.loads(Path("runs/tiny/environment.json").read_text())
    assert (environment["outcome"], environment["steps"]) == ("stopped by ConfigError", 5)


def test_a_failure_before_the_first_step_leaves_the_directory_free(error, memlm):
    failing = ("--trainer.callbacks+=test_cli_errors.FailingAtOnce",)
    assert error(*FIT, *failing) == "data.x: is wrong from the start"
    assert not Path("runs/tiny").exists()
    assert memlm(*FIT) == 0


def test_without_validation_checkpoints_come_as_often(error, memlm):
    failing = ("--trainer.callbacks+=test_cli_errors.Failing", "--trainer.callbacks.kind")
    error(*FIT, "--trainer.limit_val_batches", "0", "--trainer.val_check_interval", "2", *failing, "user")
    saved = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert memlm(*FIT, "--trainer.limit_val_batches", "0", "--ckpt_path", "last") == 0


def test_a_run_without_a_checkpoint_is_not_offered_to_continue(error):
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/notes.txt").touch()
    message = error(*FIT)
    assert "already holds notes.txt" in message and "remove it" in message and "last" not in message


def test_ctrl_c(memlm, capsys):
    failing = ("--trainer.callbacks+=test_cli_errors.Failing", "--trainer.callbacks.kind")
    assert memlm(*FIT, *failing, "ctrl-c") == 130
    assert "memlm: interrupted" in capsys.readouterr().err
    assert memlm(*FIT, "--ckpt_path", "last") == 0


def test_a_bug_keeps_its_traceback(memlm):
    failing = ("--trainer.callbacks+=test_cli_errors.Failing", "--trainer.callbacks.kind")
    with pytest.raises(ZeroDivisionError):
        memlm(*FIT, *failing, "bug")


def test_traceback_on_request(memlm, monkeypatch):
    monkeypatch.setenv("MEMLM_TRACEBACK", "1")
    with pytest.raises(ConfigError, match=r"model\.memory\.reads"):
        memlm(*FIT, "--model.memory.reads", "9")


@pytest.fixture
def checkpoint(memlm):
    assert memlm(*FIT, "--trainer.max_steps", "4") == 0
    return Path("runs/tiny/checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--model.transformer.dim 32", ["model.transformer.dim", "32", "16"]),
        ("--model.memory.layers [0]", ["model.memory.layers", "[0]", "[1]"]),
        ("--model memlm.DenseLM", ["model.class_path", "DenseLM", "MemoryLM"]),
        ("--data.values 6", ["vocab_size"]),
        ("--trainer.max_steps 4", ["trainer.max_steps", "is 4", "4 steps"]),
    ],
)
def test_contradicting_the_checkpoint(error, checkpoint, arguments, parts):
    before = checkpoint.read_bytes()
    message = error(*FIT, "--ckpt_path", "last", *arguments.split())
    for part in (*parts, str(checkpoint)):
        assert part in message
    assert checkpoint.read_bytes() == before


def test_damaged_checkpoints(error, checkpoint):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in error(*FIT, "--ckpt_path", "last")
    torch.save({"weights": 1}, checkpoint)
    assert "lacks state_dict, global_step, architecture" in error(
        "test", "--config", "tiny.yaml", "--ckpt_path", "last"
    )
    checkpoint.write_text("not a checkpoint")
    assert str(checkpoint) in error(*FIT, "--ckpt_path", str(checkpoint))
    checkpoint.write_bytes(b"")
    assert str(checkpoint) in error(*FIT, "--ckpt_path", str(checkpoint))


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_foreign_code_in_a_checkpoint_is_not_run(error, memlm, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"extra": Bomb()}, checkpoint)
    message = error("test", "--config", "tiny.yaml", "--ckpt_path", "last")
    assert str(checkpoint) in message and "--weights_only false" in message
    checkpoint.write_bytes(pickle.dumps(Bomb()))
    assert str(checkpoint) in error("test", "--config", "tiny.yaml", "--ckpt_path", str(checkpoint))
    assert not Path("exploded").exists()
    torch.save(content | {"extra": Bomb()}, checkpoint)
    for which in (str(checkpoint), "last"):
        path = ("--ckpt_path", which, "--weights_only", "false")
        assert memlm("test", "--config", "tiny.yaml", *path) == 0
        assert Path("exploded").exists()
        Path("exploded").unlink()
