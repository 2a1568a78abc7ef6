import csv
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memlm.loggers import MetricsLogger, TensorBoard
from memlm.run_metrics import read_metrics


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_rows_count_steps_taken_and_are_on_disk_at_once(path):
    logger = MetricsLogger(path)
    logger.log_metrics({"train/loss": 0.1 + 0.2, "epoch": 0}, step=0)
    assert path.read_text() == f"step,train/loss\n1,{0.1 + 0.2!r}\n"
    logger.log_metrics({"train/loss": 3}, step=9)
    assert table(path)[-1] == ["10", "3"]


def test_columns_grow_in_order_of_appearance(path):
    logger = MetricsLogger(path)
    logger.log_metrics({"b": 1.0}, step=0)
    logger.log_metrics({"a": 2.0, "b": 3.0}, step=1)
    logger.log_metrics({"a": 4.0}, step=2)
    assert table(path) == [["step", "b", "a"], ["1", "1.0", ""], ["2", "3.0", "2.0"], ["3", "", "4.0"]]


def test_a_resumed_run_drops_the_rows_beyond_its_checkpoint(path):
    logger = MetricsLogger(path)
    for step in range(6):
        logger.log_metrics({"x": float(step)}, step=step)
    resumed = MetricsLogger(path, resumed_step=4)
    assert len(table(path)) == 7  # nothing changes before there is something to write
    resumed.log_metrics({"x": 40.0}, step=4)
    assert table(path)[1:] == [["1", "0.0"], ["2", "1.0"], ["3", "2.0"], ["4", "3.0"], ["5", "40.0"]]


def test_a_row_torn_by_a_kill_is_dropped(path):
    path.write_text("step,x,y\n1,1.0,2.0\n2,1.")
    logger = MetricsLogger(path, resumed_step=2)
    logger.log_metrics({"y": 3.0}, step=1)
    assert table(path) == [["step", "x", "y"], ["1", "1.0", "2.0"], ["2", "", "3.0"]]


def test_resuming_where_even_the_header_is_torn(path):
    path.write_text("step,x")
    MetricsLogger(path, resumed_step=2).log_metrics({"y": 3.0}, step=2)
    assert table(path) == [["step", "y"], ["3", "3.0"]]


def test_an_uninterrupted_and_a_resumed_file_are_the_same(tmp_path):
    def log(logger, steps):
        for step in steps:
            logger.log_metrics({"x": step * 0.1}, step=step)
            if step % 3 == 2:
                logger.log_metrics({"val/x": step * 0.7}, step=step)

    log(MetricsLogger(tmp_path / "whole.csv"), range(10))
    log(MetricsLogger(tmp_path / "cut.csv"), range(8))
    log(MetricsLogger(tmp_path / "cut.csv", resumed_step=6), range(6, 10))
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_numbers_survive_exactly(path):
    value = torch.tensor(1 / 3).item()
    MetricsLogger(path).log_metrics({"x": value, "tokens": 2**53}, step=0)
    assert read_metrics(path) == [{"step": 1.0, "x": value, "tokens": 2.0**53}]


def test_tensorboard_waits_for_the_directory(tmp_path):
    run = tmp_path / "run"
    logger = TensorBoard(run)
    assert logger.experiment is not None  # Lightning touches it before the data is read
    assert not run.exists()
    run.mkdir()
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=9)
    logger.finalize("success")
    assert [file.name.split(".")[0] for file in run.iterdir()] == ["events"]
    events = EventAccumulator(str(run)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 0.5)]


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    for resumed, steps in ((None, range(6)), (4, range(4, 7))):
        logger = TensorBoard(tmp_path, resumed)
        for step in steps:
            logger.log_metrics({"x": float(step)}, step=step)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("x")] == [1, 2, 3, 4, 5, 6, 7]
