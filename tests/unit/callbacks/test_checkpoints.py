import os
import resource
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
from memlm.errors import CheckpointError


class FakeTrainer:
    """Counts steps and saves its step number."""

    def __init__(self):
        self.global_step = 0
        self.callback_metrics = {}
        self.sanity_checking = False
        self.fast_dev_run = False
        self.is_global_zero = True
        self.state = SimpleNamespace(fn=TrainerFn.FITTING)
        self.strategy = SimpleNamespace(barrier=lambda name: None)
        self.saves = 0
        self.ckpt_path = None

    def save_checkpoint(self, path, weights_only):
        assert weights_only is False
        self.saves += 1
        AtomicCheckpointIO().save_checkpoint({"step": self.global_step}, path)


@pytest.fixture
def trainer():
    return FakeTrainer()


def steps(folder):
    return {path.stem: torch.load(path)["step"] for path in sorted(folder.iterdir())}


def validate(callback, trainer, step, loss):
    trainer.global_step = step
    trainer.callback_metrics = {} if loss is None else {"val/loss": torch.tensor(loss)}
    callback.on_validation_end(trainer, None)


def test_last_follows_and_best_stays(tmp_path, trainer):
    callback = Checkpoints(tmp_path)
    callback.on_train_start(trainer, None)
    for step, loss, expected in (
        (2, 3.0, (2, 2)),
        (4, 2.0, (4, 4)),
        (6, 2.5, (6, 4)),
        (8, float("nan"), (8, 4)),
    ):
        validate(callback, trainer, step, loss)
        assert steps(tmp_path) == {"last": expected[0], "best": expected[1]}
    trainer.global_step = 9
    callback.on_train_end(trainer, None)
    assert steps(tmp_path) == {"last": 9, "best": 4}
    assert trainer.saves == 5  # best is a second name, not a second write


def test_a_run_that_starts_with_nan_can_still_have_a_best(tmp_path, trainer):
    callback = Checkpoints(tmp_path)
    validate(callback, trainer, 2, float("nan"))
    assert steps(tmp_path) == {"last": 2}
    validate(callback, trainer, 4, 5.0)
    assert steps(tmp_path) == {"last": 4, "best": 4}


def test_the_end_is_not_saved_twice(tmp_path, trainer):
    callback = Checkpoints(tmp_path)
    callback.on_train_start(trainer, None)
    validate(callback, trainer, 4, 1.0)
    callback.on_train_end(trainer, None)
    assert trainer.saves == 1


def test_nothing_new_nothing_saved(tmp_path, trainer):
    trainer.global_step = 7  # resumed, and stopped before a step
    callback = Checkpoints(tmp_path)
    callback.on_train_start(trainer, None)
    callback.on_train_end(trainer, None)
    assert trainer.saves == 0


@pytest.mark.parametrize("change", [{"sanity_checking": True}, {"fast_dev_run": 1}])
def test_no_saves_outside_training(tmp_path, trainer, change):
    vars(trainer).update(change)
    validate(Checkpoints(tmp_path), trainer, 4, 1.0)
    trainer.state.fn = TrainerFn.VALIDATING
    vars(trainer).update({"sanity_checking": False, "fast_dev_run": False})
    validate(Checkpoints(tmp_path), trainer, 4, 1.0)
    assert trainer.saves == 0


def test_best_score_continues_over_a_resume(tmp_path, trainer):
    first = Checkpoints(tmp_path)
    validate(first, trainer, 4, 1.0)
    resumed = Checkpoints(tmp_path)
    resumed.load_state_dict(first.state_dict())
    validate(resumed, trainer, 8, 1.5)
    assert steps(tmp_path) == {"last": 8, "best": 4}


def test_best_gets_its_name_though_a_kill_came_before(tmp_path, trainer):
    callback = Checkpoints(tmp_path)
    validate(callback, trainer, 2, 3.0)
    validate(callback, trainer, 4, 2.0)
    os.remove(tmp_path / "best.ckpt")
    for path, expected in (("best.ckpt", {"last": 4}), ("last.ckpt", {"last": 4, "best": 4})):
        resumed = Checkpoints(tmp_path)
        resumed.load_state_dict(callback.state_dict())
        trainer.ckpt_path = tmp_path / path
        resumed.on_train_start(trainer, None)
        assert steps(tmp_path) == expected


def test_a_run_in_a_new_directory_gets_a_best_of_its_own(tmp_path, trainer):
    resumed = Checkpoints(tmp_path / "new")
    resumed.load_state_dict({"best_score": 1.0})
    validate(resumed, trainer, 8, 1.5)
    assert steps(tmp_path / "new") == {"last": 8, "best": 8}


def test_a_metric_that_is_never_logged_makes_no_best(tmp_path, trainer):
    validate(Checkpoints(tmp_path), trainer, 4, None)
    assert steps(tmp_path) == {"last": 4}


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: 2}, path)
    assert torch.load(path) == {"step": 1}


def test_leftovers_of_ranks_that_were_killed_are_not_in_the_way(tmp_path, trainer):
    for name in ("last", "best"):
        (tmp_path / f".{name}.ckpt.tmp").mkdir()
        (tmp_path / f".{name}.ckpt.tmp" / "__0_0.distcp").write_text("a part")
    validate(Checkpoints(tmp_path), trainer, 2, 1.0)
    assert steps(tmp_path) == {"last": 2, "best": 2}


def test_a_full_disk_is_said_in_one_line(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"last\.ckpt: cannot be written: .*"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_without_hard_links_best_is_a_copy(tmp_path, trainer, monkeypatch):
    def refuse(*args):
        raise OSError

    monkeypatch.setattr("os.link", refuse)
    callback = Checkpoints(tmp_path)
    validate(callback, trainer, 2, 1.0)
    validate(callback, trainer, 4, 2.0)
    assert steps(tmp_path) == {"last": 4, "best": 2}


def test_sharded_checkpoints_are_folders(tmp_path, trainer):
    def save(path, weights_only):
        path.mkdir(exist_ok=True)
        (path / "shard").write_text(str(trainer.global_step))

    trainer.save_checkpoint = save
    callback = Checkpoints(tmp_path)
    for step, loss in ((2, 2.0), (4, 1.0), (6, 3.0)):
        validate(callback, trainer, step, loss)
    assert {path.name: (path / "shard").read_text() for path in tmp_path.iterdir()} == {
        "last.ckpt": "6",
        "best.ckpt": "4",
    }
