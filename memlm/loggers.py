"""Loggers of a run: metrics.csv and TensorBoard, both counting optimizer steps taken.

Lightning numbers rows from 0, so the row written after the tenth step carries 9 while the checkpoint written
there carries ``global_step`` 10. Both loggers here add the one, so that rows, checkpoints and ``max_steps``
agree.
"""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from memlm.run_directory import RunFiles, write_text
from memlm.run_metrics import complete_lines


class MetricsLogger(Logger):
    """Appends one row for every logging call to a CSV file; cells that were not logged are empty.

    Lightning's own CSVLogger deletes or shadows the earlier file when a run is resumed. Here a resumed run
    first drops the rows written after the checkpoint, so that the file reads as if the run had never stopped.
    A row is on disk when the call returns. Columns are added as new metrics appear, in order of appearance.

    Args:
        path: The file; its folder must exist by the time of the first row.
        resumed_step: Optimizer steps in the checkpoint that the run continues from; rows beyond are dropped.
    """

    def __init__(self, path: str | Path, resumed_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self.resumed_step = resumed_step
        self._columns: list[str] | None = None  # None: the file has not been looked at

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""  # empty: the progress bar then shows no version number

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._columns is None:
            self._columns = self._open()
        row = _without_epoch(metrics)
        if not row:
            return
        values = {"step": (step or 0) + 1, **row}
        added = [key for key in values if key not in self._columns]
        if added:
            self._columns += added
            self._rewrite(self._read() if self.path.exists() else [])
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_csv_line([values.get(column, "") for column in self._columns]))

    def _open(self) -> list[str]:
        """Columns of the file as it stands, after dropping what the resumed run will write again."""
        if not self.path.exists():
            return []
        kept = [
            row for row in self._read() if self.resumed_step is None or int(row["step"]) <= self.resumed_step
        ]
        self._columns = next(csv.reader(complete_lines(self.path)), [])
        self._rewrite(kept)  # even if no row is dropped: a kill may have torn the last line
        return self._columns

    def _read(self) -> list[dict[str, str]]:
        return list(csv.DictReader(complete_lines(self.path)))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        lines = [_csv_line(self._columns)]
        lines += [_csv_line([row.get(column, "") for column in self._columns]) for row in rows]
        write_text(self.path, "".join(lines))


class TensorBoard(TensorBoardLogger):
    """TensorBoard events directly in the run directory, from the moment the run has claimed it.

    Args:
        directory: The run directory.
        resumed_step: Optimizer steps in the checkpoint that the run continues from; later events are hidden.
    """

    def __init__(self, directory: str | Path, resumed_step: int | None = None) -> None:
        purge: dict[str, Any] = {} if resumed_step is None else {"purge_step": resumed_step + 1}
        super().__init__(save_dir=directory, name="", version="", default_hp_metric=False, **purge)

    @property
    def experiment(self) -> Any:
        # Lightning touches every logger before the data is read. An event file made then would leave a
        # directory behind when the data turns out to be missing.
        if not os.path.isdir(self.root_dir):
            return _DummyExperiment()
        return super().experiment

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(_without_epoch(metrics), (step or 0) + 1)

    @rank_zero_only
    def save(self) -> None:
        """Nothing: the writer flushes by itself; the base class would also write an empty hparams.yaml."""


def run_loggers(chosen: Any, files: RunFiles, resumed_step: int | None) -> Any:
    """The loggers of a run: those of the configuration in place of TensorBoard, and always metrics.csv.

    Args:
        chosen: ``trainer.logger``; null means TensorBoard, false none at all.
        files: The run directory.
        resumed_step: Optimizer steps in the run's checkpoint that it continues from, None for a fresh run.
    """
    if chosen is False:
        return False
    metrics = MetricsLogger(files.metrics, resumed_step)
    if chosen is None or chosen is True:
        return [metrics, TensorBoard(files.directory, resumed_step)]
    return [metrics, *(chosen if isinstance(chosen, list) else [chosen])]


def _csv_line(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _without_epoch(metrics: Mapping[str, float]) -> dict[str, float]:
    # The training stream has no end, hence no epochs: Lightning's counter would be a column of zeros.
    return {key: value for key, value in metrics.items() if key != "epoch"}
