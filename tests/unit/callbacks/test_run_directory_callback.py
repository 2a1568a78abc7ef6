import json
from types import SimpleNamespace

import pytest
import torch

from callbacks import run_directory
from callbacks.run_directory import RunDirectory, summary
from memlm.run_directory import RunFiles


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(run_directory, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


@pytest.fixture
def trainer():
    return SimpleNamespace(
        is_global_zero=True,
        fast_dev_run=False,
        global_step=7,
        callback_metrics={},
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(barrier=lambda: None),
    )


def test_clocks(tmp_path, clock, trainer):
    callback = RunDirectory(RunFiles(tmp_path / "run"), "a: 1\n", ["fit"])
    callback._begin()

    def batch(seconds):
        callback.on_train_batch_start(trainer, None, None, 0)
        clock.seconds += seconds

    clock.seconds += 1000  # before the first batch
    batch(2)
    batch(3)
    callback.on_validation_start(trainer, None)
    clock.seconds += 50
    callback.on_validation_end(trainer, None)
    clock.seconds += 700  # a checkpoint
    batch(4)
    assert callback.state_dict() == {"train_seconds": 9, "validation_seconds": 50}
    batch(1)
    callback.on_train_end(trainer, SimpleNamespace(tokens_seen=123))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["train_seconds"], environment["validation_seconds"]) == (10, 50)
    assert (environment["outcome"], environment["steps"], environment["tokens"]) == ("finished", 7, 123)


def test_clocks_continue_over_a_resume(tmp_path, clock, trainer):
    callback = RunDirectory(RunFiles(tmp_path / "run"))
    callback.load_state_dict({"train_seconds": 40.0, "validation_seconds": 5.0})
    callback.on_train_batch_start(trainer, None, None, 0)
    clock.seconds += 2
    assert callback.state_dict() == {"train_seconds": 42, "validation_seconds": 5}


def test_other_ranks_and_dry_runs_write_nothing(tmp_path, trainer, monkeypatch):
    monkeypatch.setattr(run_directory, "describe_model", lambda *_: {})
    monkeypatch.setattr(run_directory, "summary", lambda _: "")
    for change in ({"is_global_zero": False}, {"fast_dev_run": 2}):
        other = SimpleNamespace(**vars(trainer) | change)
        callback = RunDirectory(RunFiles(tmp_path / "run"))
        callback.on_fit_start(other, None)
        callback.on_train_end(other, SimpleNamespace(tokens_seen=1))
        callback.on_test_end(other, None)
    assert not (tmp_path / "run").exists()


def test_result_names_its_source(tmp_path, trainer):
    source = {"checkpoint": "runs/a/checkpoints/last.ckpt", "step": 7, "tokens": 99}
    trainer.callback_metrics = {"test/loss": torch.tensor(0.5), "test/asked": 3}
    RunDirectory(RunFiles(tmp_path), source=source).on_test_end(trainer, None)
    assert json.loads((tmp_path / "test.json").read_text()) == {"test/asked": 3, "test/loss": 0.5} | source


def test_unfinished_predictions_do_not_replace_earlier_ones(tmp_path, trainer):
    files = RunFiles(tmp_path)
    files.predictions.write_text("earlier\n")
    callback = RunDirectory(files)
    callback.on_predict_start(trainer, None)
    callback.on_predict_batch_end(trainer, None, [{"answer": "a"}], None, 0)
    callback.on_exception(trainer, None, KeyboardInterrupt())
    assert files.predictions.read_text() == "earlier\n"
    callback.on_predict_start(trainer, None)
    callback.on_predict_batch_end(trainer, None, [{"answer": "a"}, {"answer": "b"}], None, 0)
    callback.on_predict_batch_end(trainer, None, [{"answer": "c"}], None, 1)
    callback.on_predict_end(trainer, None)
    assert [json.loads(line)["answer"] for line in files.predictions.read_text().splitlines()] == [
        "a",
        "b",
        "c",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_summary():
    description = {
        "total": 12345,
        "active": 1234,
        "memory": 11111,
        "flops_per_token": 9999,
        "values_read_per_token": 64,
        "architecture": {"class_path": "memlm.MemoryLM"},
    }
    assert summary(description) == (
        "MemoryLM: 12,345 parameters, 1,234 active per token, 11,111 in memory values; "
        "9,999 forward FLOPs and 64 values read per token"
    )
