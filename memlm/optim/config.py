"""Options of the optimizer: of the dense parameters, and of the value rows."""

from dataclasses import dataclass, field

from memlm.errors import ConfigError
from memlm.optim.schedule import ScheduleConfig


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
    """AdamW of the value rows: a row moves only in a step that reads it."""

    learning_rate: float = 1e-2
    """Base learning rate. The paper's code uses ten times the dense rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moments, for each step in which the row is read."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of a row, in the steps that read it."""
    clip: float | None = 1.0
    """Largest norm of the row gradients, apart from the dense ones; null clips nothing."""
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
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"{key}.clip", f"is {self.clip}, must be positive; null clips nothing")


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
