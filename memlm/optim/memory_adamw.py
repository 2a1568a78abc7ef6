"""One optimizer for dense parameters and for the rows of value tables."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from memlm.kernels import reference
from memlm.memory import RowGradient


class MemoryAdamW(torch.optim.Optimizer):
    """AdamW whose ``memory`` groups move only the rows that were read.

    Lightning's automatic optimisation, schedulers and checkpoints expect one optimizer; this one
    branches on its groups' ``kind``:

    - ``dense``: ``torch.optim.AdamW`` (arXiv 1711.05101), bit for bit its fused implementation.
    - ``memory``: each parameter is a value table ``[S, V]`` whose gradient is a
      :class:`~memlm.memory.RowGradient`. Rows read since ``zero_grad`` get an AdamW update; all others
      keep their values and moments (lazy moments, as in ``torch.optim.SparseAdam``). When every row is
      read in every step this equals AdamW; with ``weight_decay=0`` it equals SparseAdam. Dense AdamW
      would move a row by its old momentum, and decay it, in every step.

    Differs from a plain optimizer in two ways that resuming needs: the state is made in the constructor,
    and ``load_state_dict`` restores state but keeps the hyper-parameters given to the constructor, so
    that rates and decay come from the present configuration, not from the checkpoint.

    Args:
        groups: Dicts with ``params``, ``kind`` and any of ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``name``, ``clip``.
        row_gradients: The row gradient of every parameter in a memory group.
        lr: Default learning rate.
        betas: Default decay rates of the moments.
        eps: Default epsilon.
        weight_decay: Default decoupled weight decay.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        row_gradients: Mapping[nn.Parameter, RowGradient] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "kind": "dense", "name": "", "lr": lr, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "clip": None,
        }  # fmt: skip
        super().__init__(groups, defaults)
        self._row_gradients = dict(row_gradients or {})
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["kind"] == "memory":
                    if parameter not in self._row_gradients:
                        raise ValueError("a parameter of a memory group has no row gradient")
                    moment_dtype = torch.promote_types(parameter.dtype, torch.float32)
                elif group["kind"] == "dense":
                    moment_dtype = parameter.dtype
                else:
                    raise ValueError(f"unknown kind of parameter group: {group['kind']!r}")
                self.state[parameter] = {
                    "step": torch.tensor(0.0, device=parameter.device if _fusible(parameter) else "cpu"),
                    "exp_avg": torch.zeros_like(parameter, dtype=moment_dtype),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=moment_dtype),
                }

    def row_gradients(self, group: dict[str, Any]) -> list[RowGradient]:
        """The row gradients of a memory group's parameters."""
        return [self._row_gradients[parameter] for parameter in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget dense and row gradients."""
        super().zero_grad(set_to_none)
        for gradient in self._row_gradients.values():
            gradient.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "memory":
                self._step_rows(group)
            else:
                self._step_dense(group)
        return loss

    def _step_dense(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for fused in (True, False):
            part = [parameter for parameter in parameters if _fusible(parameter) == fused]
            if not part:
                continue
            states = [self.state[parameter] for parameter in part]
            adamw(
                part,
                [_gradient(parameter) for parameter in part],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=fused,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _step_rows(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            state = self.state[parameter]
            state["step"] += 1
            compact = self._row_gradients[parameter].compact()
            if compact is None:
                continue
            rows, gradients = compact
            reference.adamw_rows(
                parameter,
                state["exp_avg"],
                state["exp_avg_sq"],
                rows,
                gradients,
                step=int(state["step"]),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments and step counts; hyper-parameters stay as constructed.

        Raises:
            ValueError: The saved state has other groups, parameters or shapes.
        """
        saved_shapes = [
            state_dict["state"][index]["exp_avg"].shape
            for group in state_dict["param_groups"]
            for index in group["params"]
            if index in state_dict["state"]
        ]
        own_shapes = [p.shape for group in self.param_groups for p in group["params"]]
        if saved_shapes != own_shapes:
            raise ValueError(
                f"optimizer state does not fit: it holds moments of {[tuple(s) for s in saved_shapes]}, "
                f"the model has parameters of {[tuple(s) for s in own_shapes]}"
            )
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)


def _fusible(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
