"""One optimizer over all parameters of a model, and its schedule."""

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from memlm.memory.row_gradient import RowGradient
from memlm.optim.config import ROW_OPTIONS, OptimizerConfig, ValuesOptimizerConfig
from memlm.optim.memory_adamw import MemoryAdamW
from memlm.optim.parameter_groups import assign
from memlm.optim.schedule import Schedule


def configure(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    row_gradients: Mapping[nn.Parameter, RowGradient],
    dense: OptimizerConfig,
    values: ValuesOptimizerConfig | None,
    max_steps: int,
    kind: type[MemoryAdamW] = MemoryAdamW,
) -> tuple[MemoryAdamW, Schedule]:
    """A MemoryAdamW whose groups have the options given, and its schedule.

    Args:
        named_parameters: Those without ``requires_grad`` are left out.
        row_gradients: The gradient of each value table.
        dense: Options of all other parameters.
        values: Options of the value tables; None only if there are none.
        max_steps: Optimizer steps of the whole run.
        kind: The optimizer's class.
    """
    groups, schedules = [], []
    for name, parameters in assign(named_parameters).items():
        options = values if name == "values" else dense
        assert options is not None, "value tables without options"
        groups.append(
            {
                "params": parameters,
                "name": name,
                "kind": "memory" if name == "values" else "dense",
                "lr": options.learning_rate,
                "betas": tuple(options.betas),
                "eps": options.eps,
                "weight_decay": 0.0 if name == "no_decay" else options.weight_decay,
            }
        )
        if isinstance(options, ValuesOptimizerConfig):
            groups[-1] |= {option: getattr(options, option) for option in ROW_OPTIONS}
        schedules.append(options.schedule)
    if (
        values is not None
        and values.rounding == "master"
        and not any(table.dtype == torch.bfloat16 for table in row_gradients)
    ):
        rank_zero_warn("model.values_optimizer.rounding is master, which does nothing: no values are bf16")
    optimizer = kind(groups, row_gradients)
    if any(schedule.warmup_steps >= max_steps for schedule in schedules):
        rank_zero_warn(f"trainer.max_steps is {max_steps}: the run ends during a schedule's warm-up")
    return optimizer, Schedule(optimizer, schedules, max_steps)
