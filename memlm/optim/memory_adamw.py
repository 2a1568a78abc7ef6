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
      read in every step this equals AdamW; with ``weight_decay=0`` it equals SparseAdam, but for
      epsilon, which is added after the bias correction, as in AdamW. Dense AdamW would move a row by
      its old momentum, and decay it, in every step.

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
                # On the CPU, int(step) does not wait for the device; the fused kernel wants it there.
                step_device = torch.device("cpu")
                if group["kind"] == "memory":
                    if parameter not in self._row_gradients:
                        raise ValueError("a parameter of a memory group has no row gradient")
                    moment_dtype = torch.promote_types(parameter.dtype, torch.float32)
                elif group["kind"] == "dense":
                    moment_dtype = parameter.dtype
                    if _fusible(parameter):
                        step_device = parameter.device
                else:
                    raise ValueError(f"unknown kind of parameter group: {group['kind']!r}")
                self.state[parameter] = {
                    "step": torch.tensor(0.0, device=step_device),
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

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments and step counts; hyper-parameters stay as constructed.

        Raises:
            ValueError: The saved state has other groups, parameters or shapes.
        """
        saved_groups = state_dict["param_groups"]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != own_sizes:
            raise ValueError(
                f"optimizer state does not fit: its groups hold {saved_sizes} parameters, "
                f"this optimizer's {own_sizes}"
            )
        pairs = [
            (parameter, state_dict["state"].get(index))
            for group, saved_group in zip(self.param_groups, saved_groups, strict=True)
            for parameter, index in zip(group["params"], saved_group["params"], strict=True)
        ]
        for number, (parameter, saved) in enumerate(pairs):
            shape = None if saved is None else tuple(saved["exp_avg"].shape)
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"optimizer state does not fit: moments {number} have shape {shape}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
        # Copied into the tensors at hand: torch's own would cast moments to the parameter's dtype, leave
        # step counts on the device they were saved from, and share tensors with the given state.
        for parameter, saved in pairs:
            for name, tensor in self.state[parameter].items():
                tensor.copy_(saved[name])


def _fusible(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
