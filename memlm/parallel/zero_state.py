"""What ZeRO holds of the dense parameters: read and written by parameter, whatever the stage."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memlm.memory import MemoryPool

MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def hidden_values(pools: Iterable[MemoryPool]) -> Iterator[None]:
    """Within it, the value tables are attributes of their pools, not parameters: ZeRO does not find them."""
    taken = {pool: pool._parameters.pop("values") for pool in pools}
    for pool, values in taken.items():
        pool.__dict__["values"] = values
    try:
        yield
    finally:
        for pool, values in taken.items():
            del pool.__dict__["values"]
            pool.register_parameter("values", values)


class ZeroState:
    """Parameters, moments and gradients that a DeepSpeed engine has spread over all ranks.

    ZeRO keeps fp32 values and moments in flat tensors, an even part on each rank; under stage 3 the
    parameters themselves too.

    Args:
        engine: DeepSpeed's, of ZeRO stage 1, 2 or 3.
        adamw: The optimizer that it was made with; None if it trains nothing.
        pools: Of the model, whose values the engine does not know.
    """

    def __init__(self, engine: Any, adamw: torch.optim.AdamW | None, pools: Iterable[MemoryPool]) -> None:
        self._engine, self._zero, self._adamw = engine, engine.optimizer, adamw
        self._pools = list(pools)
        self._splits_parameters = engine.zero_optimization_stage() == 3
        if adamw is not None:
            self._make_moments(adamw)

    def _make_moments(self, adamw: torch.optim.AdamW) -> None:
        """Before the first step, where torch would make them: a checkpoint needs places to read into."""
        name = (
            "fp32_partitioned_groups_flat" if self._splits_parameters else "single_partition_of_fp32_groups"
        )
        for part in getattr(self._zero, name):
            adamw.state[part] = {
                "step": torch.zeros((), device=part.device),
                **{kind: torch.zeros_like(part) for kind in MOMENTS},
            }
        if not self._splits_parameters:
            self._zero._lazy_init_hp_params_optimizer_state()

    # -- training

    def gradient_norm(self) -> Tensor:
        """Of the mean over ranks of the dense gradients, after the last backward pass; inf for no number."""
        if self._splits_parameters:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            return combine_grad_norm_groups(self._zero._get_norm_groups())
        return self._zero.scaled_global_norm()

    def clip(self, max_norm: Tensor | float) -> None:
        """The norm to which the next step scales gradients down."""
        self._zero.clip_grad = max_norm

    def step(self) -> bool:
        """Update the dense parameters; whether that was done: not for gradients that are no numbers."""
        with hidden_values(self._pools):
            self._engine.step()
        return self._engine.was_step_applied()

    # -- checkpoints

    def trains(self, parameter: nn.Parameter) -> bool:
        """Whether there are fp32 values and moments of a dense parameter."""
        return self._adamw is not None and parameter.requires_grad

    @property
    def steps(self) -> Tensor:
        """How many steps the dense parameters have taken, a scalar."""
        assert self._adamw is not None
        return next(iter(self._adamw.state.values()))["step"]

    @steps.setter
    def steps(self, steps: Tensor) -> None:
        assert self._adamw is not None
        for state in self._adamw.state.values():
            state["step"].copy_(steps)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A dense parameter, its fp32 values if it is trained; every rank must call this."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if self.trains(parameter):
            return safe_get_full_fp32_param(parameter)
        if not self._splits_parameters:
            return parameter.detach()
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def whole_moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """A moment of a trained parameter; every rank must call this."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, kind)

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a dense parameter, and its fp32 values if it is trained."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if not self._splits_parameters:
            if self.trains(parameter):
                safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
            return
        held: Any = parameter
        part = self._part(parameter, value)
        if self.trains(parameter):
            safe_set_local_fp32_param(parameter, part)
        held.ds_tensor.data.copy_(part)
        if parameter.shape == held.ds_shape:  # small ones stay whole on every rank
            parameter.copy_(value)

    @torch.no_grad()
    def put_moment(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set a moment of a trained parameter."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._splits_parameters:
            # Not the whole: DeepSpeed would not pad what does not divide evenly.
            safe_set_local_optimizer_state(parameter, self._part(parameter, value), kind)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    @staticmethod
    def _part(parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a parameter's elements, padded."""
        held: Any = parameter
        size = held.ds_tensor.numel()
        start = min(size * torch.distributed.get_rank(), value.numel())
        elements = value.flatten()[start : start + size]
        return nn.functional.pad(elements, (0, size - len(elements)))
