"""Learning-rate schedules: a factor on each group's base rate, as a function of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memlm.errors import ConfigError


@dataclass
class ScheduleConfig:
    """Warm-up, then one of four shapes down to ``final_ratio`` of the rate at the run's last step."""

    shape: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """linear or cosine decay after warm-up; wsd (warm-up, stable, linear decay at the end); constant."""
    warmup_steps: int = 0
    """Optimizer steps in which the rate rises linearly from near zero."""
    final_ratio: float = 0.01
    """Share of the base rate at the last step; ignored by constant."""
    decay_share: float = 0.2
    """wsd only: share of all steps that the final decay takes."""

    def validate(self, key: str) -> None:
        """Check the values.

        Args:
            key: YAML key of this section, for the message.

        Raises:
            ConfigError: Names the key at fault.
        """
        if self.warmup_steps < 0:
            raise ConfigError(f"{key}.warmup_steps", f"is {self.warmup_steps}, must not be negative")
        if not 0 <= self.final_ratio <= 1:
            raise ConfigError(f"{key}.final_ratio", f"is {self.final_ratio}, must be between 0 and 1")
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"{key}.decay_share", f"is {self.decay_share}, must be above 0 and at most 1")

    def factor(self, step: int, total_steps: int) -> float:
        """Factor on the base rate.

        Args:
            step: Steps already taken (0 before the first).
            total_steps: Steps of the whole run.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        start = self.warmup_steps
        if self.shape == "wsd":
            start = max(start, total_steps - round(self.decay_share * total_steps))
        # The last step of the run, number total_steps - 1, is taken at final_ratio.
        progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.final_ratio + (1 - self.final_ratio) * shape


class Schedule(LRScheduler):
    """Applies one :class:`ScheduleConfig` to each parameter group.

    Unlike ``LambdaLR``, a loaded state brings only the step: base rates and shapes are those of the
    present configuration.

    Args:
        optimizer: Its groups' ``lr`` are the base rates.
        schedules: One for each group.
        total_steps: Optimizer steps of the whole run.
    """

    def __init__(self, optimizer: Optimizer, schedules: Sequence[ScheduleConfig], total_steps: int) -> None:
        self.schedules = list(schedules)
        self.total_steps = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Any]:
        """Rates of the groups at the present step."""
        return [
            base * schedule.factor(self.last_epoch, self.total_steps)
            for base, schedule in zip(self.base_lrs, self.schedules, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Only the number of steps taken."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step from the state, and set the rates that the configuration gives for it."""
        self.last_epoch = state_dict["last_epoch"]
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates
