"""One optimizer, its parameter groups, schedules and clipping."""

from memlm.optim.clipping import clip_gradients
from memlm.optim.config import OptimizerConfig, ValuesOptimizerConfig
from memlm.optim.configure import configure
from memlm.optim.memory_adamw import MemoryAdamW
from memlm.optim.parameter_groups import assign
from memlm.optim.schedule import Schedule, ScheduleConfig

__all__ = [
    "MemoryAdamW",
    "OptimizerConfig",
    "Schedule",
    "ScheduleConfig",
    "ValuesOptimizerConfig",
    "assign",
    "clip_gradients",
    "configure",
]
