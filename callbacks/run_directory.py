"""The files that describe a run: config.yaml, environment.json, model.json, test.json, predictions.jsonl."""

import json
import shutil
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.prediction_file import PredictionFile
from memlm.run_directory import RunFiles, describe_environment, now, write_json, write_text


class RunDirectory(Callback):
    """Claims the run directory once all is set up, writes what describes the run, keeps its clock.

    Training seconds are those from the first batch on without validation and what follows it until the next
    batch (checkpoints, samples); both clocks are part of the checkpoint, so that they continue over a resume.

    Args:
        files: The run directory; for test and predict that of the checkpoint.
        config: The resolved configuration, as YAML text.
        arguments: The words after ``memlm``.
        fresh: Whether the run must be the first in its directory.
        source: What the weights come from: ``checkpoint`` (its path), ``step``, ``tokens``; empty for a fresh
            run.
    """

    def __init__(
        self,
        files: RunFiles,
        config: str = "",
        arguments: list[str] | None = None,
        fresh: bool = True,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.files = files
        self.config = config
        self.arguments = arguments or []
        self.fresh = fresh
        self.source = source or {}
        self.train_seconds = 0.0
        self.validation_seconds = 0.0
        self._environment: dict[str, Any] = {}
        self._training_since: float | None = None
        self._validating_since: float | None = None
        self._predictions: PredictionFile | None = None

    # -- fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning calls this after every setup: a missing file or a callback's bad option leaves no
        # directory behind. This callback comes first, so that the directory is there for the others.
        if self._writes(trainer):
            self._begin()
        if not trainer.is_global_zero:
            return
        description = describe_model(trainer, pl_module)
        print(summary(description))
        if self._writes(trainer):
            write_json(self.files.model, description)

    def _begin(self) -> None:
        self.files.claim(self.fresh)
        earlier_config = self.files.config.read_text(encoding="utf-8") if self.files.config.exists() else ""
        write_text(self.files.config, self.config)
        self._environment = describe_environment(self.arguments)
        if self.source:
            self._environment["resumed_from"] = self.source
        if self.files.environment.exists():
            previous = json.loads(self.files.environment.read_text(encoding="utf-8"))
            previous["config"] = earlier_config
            self._environment["earlier"] = [*previous.pop("earlier", []), previous]
        write_json(self.files.environment, self._environment)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._training_since is None:
            self._training_since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop_training_clock()
        self._validating_since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validating_since is not None:
            self.validation_seconds += time.perf_counter() - self._validating_since
            self._validating_since = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop_training_clock()
        self._finish(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop_training_clock()
        if self._environment and self.fresh and trainer.global_step == 0:
            # Nothing was trained: the corrected command shall find the directory free.
            shutil.rmtree(self.files.directory)
            self._environment = {}
        self._finish(trainer, pl_module, f"stopped by {type(exception).__name__}")
        if self._predictions is not None:
            self._predictions.abandon()

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._training_since is None else time.perf_counter() - self._training_since
        return {
            "train_seconds": self.train_seconds + running,
            "validation_seconds": self.validation_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_seconds = state_dict["train_seconds"]
        self.validation_seconds = state_dict["validation_seconds"]

    # -- test and predict

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._writes(trainer):
            return
        metrics = {key: _number(value) for key, value in sorted(trainer.callback_metrics.items())}
        write_json(self.files.test, metrics | self.source)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._predictions = PredictionFile(
                self.files.predictions, trainer.global_rank, trainer.world_size
            )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._predictions is not None:
            self._predictions.write(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._predictions is not None:
            self._predictions.finish(trainer.strategy.barrier)
            self._predictions = None

    # -- helpers

    def _writes(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def stop_training_clock(self) -> None:
        """What follows, until the next batch, is no training."""
        if self._training_since is not None:
            self.train_seconds += time.perf_counter() - self._training_since
            self._training_since = None

    def _finish(self, trainer: Trainer, pl_module: LightningModule, ended: str) -> None:
        if not self._environment:  # not a fit, or it failed before the directory was ours
            return
        self._environment |= {
            "ended": now(),
            "outcome": ended,
            "steps": trainer.global_step,
            "tokens": getattr(pl_module, "tokens_seen", None),
            "train_seconds": round(self.train_seconds, 3),
            "validation_seconds": round(self.validation_seconds, 3),
        }
        write_json(self.files.environment, self._environment)


def describe_model(trainer: Trainer, model: Any) -> dict[str, Any]:
    """What model.json holds: parameters, FLOPs and bytes per token, and the architecture."""
    sequence_length = trainer.datamodule.sequence_length  # type: ignore[attr-defined]
    return {
        "sequence_length": sequence_length,
        **model.counts(sequence_length).as_dict(),
        "architecture": model.architecture(),
    }


def summary(description: dict[str, Any]) -> str:
    """One line on a model, of :func:`describe_model`."""
    name = description["architecture"]["class_path"].rsplit(".", 1)[-1]
    return (
        f"{name}: {description['total']:,} parameters, {description['active']:,} active per token, "
        f"{description['memory']:,} in memory values; {description['flops_per_token']:,} forward FLOPs and "
        f"{description['values_read_per_token']:,} values read per token"
    )


def _number(value: Any) -> float:
    return value.item() if isinstance(value, torch.Tensor) else float(value)
