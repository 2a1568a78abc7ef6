import logging
from types import SimpleNamespace

import pytest

from memlm.errors import ConfigError
from memlm.trainer_rules import check_fit, quiet


def trainer(**changes):
    values = {
        "fast_dev_run": False,
        "max_steps": 100,
        "limit_train_batches": None,
        "overfit_batches": 0.0,
        "check_val_every_n_epoch": None,
        "val_check_interval": 20,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": None,
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"limit_train_batches": 1.0},
        {"fast_dev_run": 2, "max_steps": -1, "val_check_interval": 0.5},
    ],
)
def test_accepted(changes):
    check_fit(trainer(**changes), None, 0)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"max_steps": -1}, "trainer.max_steps"),
        ({"max_steps": 0}, "trainer.max_steps"),
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches"),
        ({"limit_train_batches": 1}, "trainer.limit_train_batches"),
        ({"limit_train_batches": 0.5}, "trainer.limit_train_batches"),
        ({"overfit_batches": 3}, "trainer.overfit_batches"),
        ({"check_val_every_n_epoch": 1}, "trainer.check_val_every_n_epoch"),
        ({"val_check_interval": 1.0}, "trainer.val_check_interval"),
        ({"val_check_interval": 0}, "trainer.val_check_interval"),
        ({"val_check_interval": "00:01:00:00"}, "trainer.val_check_interval"),
        ({"accumulate_grad_batches": 3}, "trainer.val_check_interval"),
    ],
)
def test_refused(changes, key):
    with pytest.raises(ConfigError) as error:
        check_fit(trainer(**changes), None, 0)
    assert error.value.key == key


def test_steps_that_the_checkpoint_has_taken():
    check_fit(trainer(max_steps=51), "x.ckpt", 50)
    with pytest.raises(ConfigError, match=r"is 50, but checkpoint x\.ckpt has 50 steps"):
        check_fit(trainer(max_steps=50), "x.ckpt", 50)


def test_says_when_no_validation_will_run(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        check_fit(trainer(val_check_interval=400, accumulate_grad_batches=4), None, 0)
        assert not caplog.records
        check_fit(trainer(val_check_interval=404, accumulate_grad_batches=4), None, 0)
    assert "No validation will run: trainer.val_check_interval is 404 batches, the run has 400" in caplog.text


def test_quiet_drops_advertisements_only():
    quiet()
    quiet()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    record = logging.LogRecord("x", logging.INFO, "", 0, "try litlogger", (), None)
    assert not logger.filter(record)
    record.msg = "Restored all states"
    assert logger.filter(record)
    assert len(logger.filters) == len(set(logger.filters))
