"""Trainer settings that suit endless training streams, and those that such a stream rules out."""

import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from memlm.errors import ConfigError

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # a stream without end has no epochs; max_steps bounds a run
    "check_val_every_n_epoch": None,
    "val_check_interval": 500,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # its FLOPs are zero for us; RunDirectory prints the true counts
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,  # data modules give every rank its share themselves
}
"""Defaults of the ``trainer`` section where they differ from Lightning's."""


def check_fit(trainer: Any, checkpoint: Path | None, steps_done: int) -> None:
    """Refuses Trainer settings under which training would not end, not start or not resume exactly.

    Args:
        trainer: The parsed ``trainer`` section.
        checkpoint: The checkpoint that training starts from.
        steps_done: Optimizer steps in that checkpoint.

    Raises:
        ConfigError: naming the key, its value and what is expected.
    """
    if trainer.fast_dev_run:
        return
    if trainer.max_steps < 1:
        raise ConfigError("trainer.max_steps", "must be given, at least 1: training streams have no end")
    if trainer.max_steps <= steps_done:
        raise ConfigError(
            "trainer.max_steps",
            f"is {trainer.max_steps}, but checkpoint {checkpoint} has {steps_done} steps behind it already; "
            "set it to the total number of steps",
        )
    for key, neutral in (("limit_train_batches", (None, 1.0)), ("overfit_batches", (0, 0.0))):
        if (value := getattr(trainer, key)) not in neutral or (value == 1 and isinstance(value, int)):
            raise ConfigError(
                f"trainer.{key}",
                f"is {value}, but a training stream has no epochs to cut; use trainer.max_steps",
            )
    if (accumulated := trainer.accumulate_grad_batches) < 1:
        raise ConfigError("trainer.accumulate_grad_batches", f"is {accumulated}, must be at least 1")
    if (trainer.gradient_clip_val or 0) < 0:
        raise ConfigError(
            "trainer.gradient_clip_val", f"is {trainer.gradient_clip_val}, must not be negative"
        )
    interval, accumulate = trainer.val_check_interval, trainer.accumulate_grad_batches
    if trainer.check_val_every_n_epoch is not None:
        raise ConfigError(
            "trainer.check_val_every_n_epoch",
            f"is {trainer.check_val_every_n_epoch}, must be null: epochs never end; "
            "use trainer.val_check_interval",
        )
    if not isinstance(interval, int) or interval < 1:
        raise ConfigError(
            "trainer.val_check_interval", f"is {interval!r}, expected a number of batches, at least 1"
        )
    if interval % accumulate:
        raise ConfigError(
            "trainer.val_check_interval",
            f"is {interval} batches, not a multiple of trainer.accumulate_grad_batches {accumulate}: a "
            "checkpoint between two optimizer steps cannot be resumed exactly",
        )
    if interval > trainer.max_steps * accumulate:
        rank_zero_info(
            f"No validation will run: trainer.val_check_interval is {interval} batches, the run has "
            f"{trainer.max_steps * accumulate}."
        )


def quiet() -> None:
    """Silences advertisements and advice that does not apply to endless in-memory streams."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")  # Lightning 2.6 on torch 2.13
    # FSDP2's own calls.
    warnings.filterwarnings("ignore", message=r".*(all_gather_into|reduce_scatter)_tensor. is deprecated")
    # These are reduced over all ranks before they are logged.
    reduced = r"(val|test)/(.*/)?(loss|perplexity|bits_per_byte|recall\w*)|train/tokens"
    warnings.filterwarnings("ignore", message=rf".*self\.log\('({reduced})'.*sync_dist=True")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()
