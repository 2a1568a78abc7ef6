"""Evaluation tasks on local files, in a test run and every so many steps of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from tqdm import tqdm

from callbacks.run_directory import RunDirectory
from callbacks.run_folder import run_folder
from callbacks.throughput import Throughput
from memlm.errors import ConfigError
from memlm.evaluation import code_tasks, multiple_choice, question_answering, text_likelihood
from memlm.evaluation.evaluator import Evaluator
from memlm.evaluation.results import read_results, table, write_records, write_results
from memlm.evaluation.task import Task, TaskResult
from memlm.run_directory import RunFiles

TASK_MODULES = (code_tasks, multiple_choice, question_answering, text_likelihood)
"""Once they are imported, YAML can name the tasks in them by their bare names."""


class Tasks(Callback):
    """Evaluates tasks: HellaSwag, PIQA, OpenBookQA, ARC, MMLU, NQOpen, TriviaQA, HotpotQA, TextPerplexity,
    HumanEval, MBPP.

    ``memlm test`` evaluates them after the test set, prints a table and writes it to ``tasks.json`` in the
    run directory, where the results of tasks of other names stay. A fit with ``every_n_steps`` prints the
    table too and logs ``tasks/<name>/<metric>`` through its loggers; that time is not counted as training.

    Args:
        tasks: The tasks, each with class_path and init_args.
        every_n_steps: Optimizer steps of a fit between two evaluations; null: none in a fit.
        records: Whether to write what came of every example, of a test to ``tasks/<name>.jsonl``, of a fit to
            ``tasks/<name>-<step>.jsonl``.
        batch_tokens: Tokens, padding included, of which likelihoods are computed at once.
        batch_size: Prompts that are continued at once.
    """

    def __init__(
        self,
        tasks: list[Task],
        every_n_steps: int | None = None,
        records: bool = False,
        batch_tokens: int = 4096,
        batch_size: int = 16,
    ) -> None:
        if not tasks:
            raise ConfigError("trainer.callbacks: Tasks.tasks", "is empty; expected at least one task")
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    "trainer.callbacks: Tasks.tasks", f"has several tasks called {name!r}; give each its name"
                )
        least = {"every_n_steps": every_n_steps, "batch_tokens": batch_tokens, "batch_size": batch_size}
        for key, value in least.items():
            if value is not None and value < 1:
                raise ConfigError(f"trainer.callbacks: Tasks.{key}", f"is {value}, must be at least 1")
        self.tasks = tasks
        self.every_n_steps = every_n_steps
        self.records = records
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self._evaluated_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "test" or (stage == "fit" and self.every_n_steps is not None):
            # Now, and not after the test set or hours of training.
            for task in self.tasks:
                task.load()
                data = trainer.datamodule  # type: ignore[attr-defined]
                task.check(data.tokenizer, data.sequence_length)
            folder = run_folder(trainer)
            if stage == "test" and folder is not None:
                read_results(RunFiles(folder).tasks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # A step of several batches ends with the last of them.
        if self.every_n_steps is None or step == self._evaluated_step or step % self.every_n_steps:
            return
        self._evaluated_step = step
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunDirectory):
                callback.stop_training_clock()
            elif isinstance(callback, Throughput):
                callback.stop_training_clock(pl_module.device)
        results = self._evaluate(trainer, pl_module)
        self._show(trainer, f"step {step}\n{table(results)}")
        metrics: dict[str, float] = {
            f"tasks/{result.name}/{metric}": estimate.value
            for result in results
            for metric, estimate in result.metrics.items()
        }
        for logger in trainer.loggers:
            # Lightning numbers the rows of a step from 0.
            logger.log_metrics(metrics, step=step - 1)
        self._write_records(trainer, results, f"-{step}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        results = self._evaluate(trainer, pl_module)
        self._show(trainer, table(results))
        self._write_records(trainer, results, "")
        folder = run_folder(trainer)
        if folder is None:
            return
        source: dict[str, Any] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunDirectory):
                source = callback.source
        folder.mkdir(parents=True, exist_ok=True)
        file = RunFiles(folder).tasks
        write_results(file, results, source)
        self._show(trainer, f"Written to {file}")

    def _evaluate(self, trainer: Trainer, pl_module: Any) -> list[TaskResult]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        evaluator = Evaluator(
            pl_module.transformer,
            data.tokenizer,
            data.sequence_length,
            batch_tokens=self.batch_tokens,
            batch_size=self.batch_size,
            rank=trainer.global_rank,
            world=trainer.world_size,
            apart=pl_module.ranks_apart,
        )
        with trainer.precision_plugin.forward_context(), unobserved(pl_module.transformer):
            return [task.run(evaluator, self.records) for task in self.tasks]

    def _write_records(self, trainer: Trainer, results: list[TaskResult], suffix: str) -> None:
        folder = run_folder(trainer)
        if self.records and folder is not None:
            for result in results:
                write_records(folder / "tasks" / f"{result.name}{suffix}.jsonl", result.records)

    @staticmethod
    def _show(trainer: Trainer, text: str) -> None:
        if trainer.is_global_zero:
            # Above a bar that is in progress; Lightning's own print drops the text once its bar is closed.
            tqdm.write(text)


@contextmanager
def unobserved(model: nn.Module) -> Iterator[None]:
    """Within the block nobody who watches the layers' inner workings (slots, experts) is told of them."""
    kept = [(module, module.observers) for module in model.modules() if hasattr(module, "observers")]
    for module, _ in kept:
        module.observers = []  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, observers in kept:
            module.observers = observers
