"""Checkpoints of a run: ``last.ckpt``, renewed every ``val_check_interval``, and ``best.ckpt``."""

import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from memlm.errors import CheckpointError
from memlm.parallel.checkpoint_folder import read_whole
from memlm.parallel.folder_swap import beside, copy, link, put_in_place, remove
from memlm.parallel.memory_strategy import MemoryStrategy


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt``, and ``best.ckpt`` when the validation loss is the lowest so far.

    ``last.ckpt`` is renewed at every validation (every ``trainer.val_check_interval`` batches if there is
    none) and at the end of training.

    Lightning's ModelCheckpoint renews ``last.ckpt`` only when the monitored metric is among the best, writes
    every best checkpoint twice, and writes nothing when no validation ran. Here each state is written once;
    ``best.ckpt`` is a second name of the same file, or a folder of second names where several ranks write.

    Args:
        directory: Folder of the checkpoints.
        monitor: Metric whose lowest value makes a checkpoint the best.
        report: File that tells of every checkpoint its ``step``, the ``seconds`` until it was in place, the
            ``seconds_waited`` of them in which training stood still, and its ``bytes``. Default: none.
    """

    def __init__(
        self, directory: str | Path, monitor: str = "val/loss", report: str | Path | None = None
    ) -> None:
        self.directory = Path(directory)
        self.monitor = monitor
        self.report = None if report is None else Path(report)
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._saved_step: int | None = None
        self._told_to_end = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Nothing is new before the first step, whether the run starts or continues.
        self._saved_step = trainer.global_step
        self._told_to_end = False
        if isinstance(trainer.strategy, MemoryStrategy) and trainer.world_size > 1:
            # Lightning's own handler would broadcast, on each rank between other collectives.
            signal.signal(signal.SIGTERM, self._on_sigterm)
        last = self.directory / "last.ckpt"
        if trainer.is_global_zero and self.best_step == trainer.global_step and _is(trainer.ckpt_path, last):
            # The run may have been killed when this was in place, and not yet its second name.
            self._name_best(trainer.strategy)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._active(trainer):
            return
        # Without the metric, or where it is not a number, nothing is the best: no number is below NaN.
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        best = score < (math.inf if self.best_score is None else self.best_score)
        if best:
            self.best_score, self.best_step = score, trainer.global_step
        self._save(trainer, best)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(trainer.strategy, MemoryStrategy) and trainer.world_size > 1:
            self._end_together(trainer, trainer.strategy)
        # Where nothing is validated, save as often as validation would have.
        if not self._active(trainer) or (trainer.enable_validation and any(trainer.num_val_batches)):
            return
        if trainer.val_check_batch and (batch_idx + 1) % trainer.val_check_batch == 0:
            self._save(trainer, best=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._active(trainer):
            self._save(trainer, best=False)
        if isinstance(trainer.strategy, MemoryStrategy):
            trainer.strategy.finish_saving()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A scheduler takes the machine away. Lightning raises this after a batch: of training, where the
        # state is whole unless gradients are being accumulated, or of validation, where it is not. Several
        # processes have saved in _end_together, where all are at the same place.
        if not isinstance(exception, SIGTERMException) or not self._active(trainer):
            return
        if trainer.training and not trainer.fit_loop._should_accumulate() and trainer.world_size == 1:
            self._save(trainer, best=False)

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A run that continues another run's checkpoint in a new directory has no best checkpoint of its own
        # yet.
        if any((self.directory / name).exists() for name in ("best.ckpt", "last.ckpt")):
            self.best_score, self.best_step = state_dict["best_score"], state_dict.get("best_step")

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._told_to_end = True

    def _end_together(self, trainer: Trainer, strategy: MemoryStrategy) -> None:
        """If one of several processes is told to end, all save after the same batch, and end."""
        if not strategy.ends(self._told_to_end) or trainer.fit_loop._should_accumulate():
            return
        if self._active(trainer):
            self._save(trainer, best=False)
        trainer._signal_connector.received_sigterm = True  # raised after this batch

    def _active(self, trainer: Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _save(self, trainer: Trainer, best: bool) -> None:
        # Validation may have saved this very step. To do so again afterwards would be wrong: Lightning's step
        # count for loggers would be one too high after a resume.
        if self._saved_step == trainer.global_step:
            return
        self._saved_step = trainer.global_step
        last = self.directory / "last.ckpt"
        strategy, step, start = trainer.strategy, trainer.global_step, time.perf_counter()
        trainer.save_checkpoint(last, weights_only=False)  # all of it, not the weights alone
        waited = time.perf_counter() - start

        def when_saved() -> None:
            self._record(step, time.perf_counter() - start, waited, _bytes_of(last))
            if best:
                self._name_best(strategy)

        if isinstance(strategy, MemoryStrategy):
            strategy.when_saved(when_saved)
        elif trainer.is_global_zero:
            when_saved()
        strategy.barrier("Checkpoints")

    def _name_best(self, strategy: Any) -> None:
        new_files = isinstance(strategy, MemoryStrategy)
        _second_name(self.directory / "last.ckpt", self.directory / "best.ckpt", new_files)

    def _record(self, step: int, seconds: float, waited: float, size: int) -> None:
        if self.report is None:
            return
        new = not self.report.exists()
        with self.report.open("a", encoding="utf-8") as file:
            if new:
                file.write("step,seconds,seconds_waited,bytes\n")
            file.write(f"{step},{seconds:.4f},{waited:.4f},{size}\n")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, then renames it: a kill leaves the previous one whole.

    Lightning's own way serialises into memory first (a second copy of a large table of values and moments)
    and moves the file over from the system's temporary folder, which between file systems is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = beside(path)
        remove(temporary)  # what a kill has left; several ranks write folders
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # torch's, of a full disk too
            remove(temporary)
            raise CheckpointError(path, f"cannot be written: {str(error).splitlines()[0]}") from error
        if path.is_dir():  # of a run on several ranks that goes on with one
            put_in_place(temporary, path)
        else:
            os.replace(temporary, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_whole(Path(path), weights_only is None or weights_only)
        return super().load_checkpoint(path, map_location or (lambda storage, loc: storage), weights_only)


def _is(path: Any, other: Path) -> bool:
    return path is not None and other.exists() and Path(path).exists() and other.samefile(path)


def _bytes_of(checkpoint: Path) -> int:
    files = checkpoint.iterdir() if checkpoint.is_dir() else [checkpoint]
    return sum(file.stat().st_size for file in files)


def _second_name(source: Path, target: Path, new_files: bool) -> None:
    """Give a checkpoint a second name.

    Args:
        source: The checkpoint.
        target: Its second name.
        new_files: Whether the next checkpoint of the first name has files of its own, if this is a folder.
            Other strategies write into those that are there.
    """
    if source.is_dir():  # several ranks wrote it
        (link if new_files else copy)(source, target)
        return
    if target.is_dir():
        shutil.rmtree(target)
    temporary = beside(target)
    remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
