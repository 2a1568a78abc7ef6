"""Options of the optimizer: of the dense parameters, and of the value rows."""

from dataclasses import dataclass, field
from typing import Literal

from memlm.errors import ConfigError
from memlm.kernels.interface import Method
from memlm.optim.row_state import Moments, Rounding
from memlm.optim.schedule import ScheduleConfig

ROW_OPTIONS = ("method", "moments", "rounding", "seed", "clip")
"""Fields of :class:`ValuesOptimizerConfig` that only a memory group has."""


@dataclass
class OptimizerConfig:
    """AdamW of the dense parameters. Gradients are clipped to trainer.gradient_clip_val."""

    learning_rate: float = 1e-3
    """Base learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the linear maps; norms, biases, embeddings and half keys have none."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule, over trainer.max_steps."""

    def validate(self, key: str) -> None:
        """Check the values.

        Args:
            key: YAML key of this section, for the message.

        Raises:
            ConfigError: Names the key at fault.
        """
        _check_adamw(self, key)


@dataclass
class ValuesOptimizerConfig:
    """The optimizer of the value rows: a row moves only in a step that reads it."""

    learning_rate: float = 1e-2
    """Base learning rate. The paper's code uses ten times the dense rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments. With 0 as the first no first moments are kept."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay. A row pays it when it is read, for every step since it was last read."""
    clip: float | Literal["global"] | None = 1.0
    """Largest norm of the row gradients, apart from the dense ones; global: one norm over both, clipped to
    trainer.gradient_clip_val; null clips nothing."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule, over trainer.max_steps."""
    method: Method = "adamw"
    """adamw; adamw_rowwise (one second moment a row: a third less memory); sgd (no moments: ignores betas,
    eps and moments)."""
    moments: Moments = "lazy"
    """lazy: the moments of a row decay only in steps that read it. caught_up: when a row is read, they first
    decay for all the steps since it was last read."""
    rounding: Rounding = "stochastic"
    """How values in bf16 take updates too small for them: stochastic rounding, or master (fp32 values kept
    beside them). Values in fp32 need neither."""
    seed: int = 0
    """Seed of the stochastic rounding."""

    def validate(self, key: str) -> None:
        """Check the values.

        Args:
            key: YAML key of this section, for the message.

        Raises:
            ConfigError: Names the key at fault.
        """
        _check_adamw(self, key)
        if isinstance(self.clip, int | float) and not self.clip > 0:
            raise ConfigError(f"{key}.clip", f"is {self.clip}, must be positive; null clips nothing")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"{key}.seed", f"is {self.seed}, must be at least 0 and below 2^63")
        if self.learning_rate * self.weight_decay >= 1:
            raise ConfigError(
                f"{key}.weight_decay",
                f"times {key}.learning_rate is {self.learning_rate * self.weight_decay}, must be below 1: "
                "it is the share of a value that one step takes away",
            )


def _check_adamw(config: OptimizerConfig | ValuesOptimizerConfig, key: str) -> None:
    if config.learning_rate <= 0:
        raise ConfigError(f"{key}.learning_rate", f"is {config.learning_rate}, must be positive")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ConfigError(f"{key}.betas", f"is {config.betas}, both must be at least 0 and below 1")
    if config.weight_decay < 0:
        raise ConfigError(f"{key}.weight_decay", f"is {config.weight_decay}, must not be negative")
    if config.eps < 0:
        raise ConfigError(f"{key}.eps", f"is {config.eps}, must not be negative")
    config.schedule.validate(f"{key}.schedule")
