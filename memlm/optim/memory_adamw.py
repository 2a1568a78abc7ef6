"""One optimizer for dense parameters and for the rows of value tables."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from memlm.kernels.backend import select
from memlm.kernels.interface import RowState, RowSums, RowUpdate, slot_dtype
from memlm.memory import RowGradient
from memlm.optim.meshes import by_mesh
from memlm.optim.row_state import (
    OptimizerStateError,
    add_decay,
    check_saved,
    load_saved,
    local,
    new_state,
    row_state,
)

# Elements of one chunk of rows that settle their decay.
_CHUNK_ELEMENTS = 1_000_000


class MemoryAdamW(torch.optim.Optimizer):
    """AdamW whose ``memory`` groups move only the rows that were read.

    Lightning's automatic optimisation, schedulers and checkpoints expect one optimizer; this one
    branches on its groups' ``kind``:

    - ``dense``: ``torch.optim.AdamW`` (arXiv 1711.05101), bit for bit its fused implementation.
    - ``memory``: each parameter is a value table ``[S, V]`` whose gradient is a
      :class:`~memlm.memory.RowGradient`. Rows read since ``zero_grad`` are updated; all others keep every
      bit of value and state. When every row is read in every step this equals AdamW.

    Options of a memory group:

    - ``method``: ``adamw``; ``adamw_rowwise``, whose second moment is one number a row, the mean square of
      its gradient; ``sgd``, without moments.
    - ``betas``: ``betas[0] == 0`` keeps no first moments.
    - ``moments``: ``lazy``, the moments of a row decay only in steps that read it, as in
      ``torch.optim.SparseAdam`` (which adds epsilon before the bias correction); ``caught_up``, when a row
      is read they first decay for the steps it slept, and so equal those of dense AdamW.
    - ``weight_decay``: decoupled, and owed: a row that is read first pays ``1 - lr * weight_decay`` for
      every step it slept, with the rate of that step. :meth:`settle` makes all rows pay.
    - ``rounding``, of bf16 tables: ``stochastic``, by a hash of ``seed``, step, row and column; ``master``
      keeps fp32 values beside the table (taken from it when the optimizer is constructed).
    - ``clip``: see :func:`~memlm.optim.clip_gradients`.

    Distance from dense AdamW, with caught-up moments and settled decay: none without first moments. With
    them, dense AdamW also moves a row by its old momentum while it sleeps: in the ``j``-th step of its sleep
    by ``lr * beta1^j m / (1 - beta1^(t+j)) / (sqrt(beta2^j v / (1 - beta2^(t+j))) + eps)``, in all, late in
    training, by at most ``lr * m / sqrt(v) * r / (1 - r)`` with ``r = beta1 / sqrt(beta2)``: 12 times
    ``lr * m / sqrt(v)`` for betas 0.9 and 0.95. Rows here never make that move.

    Differs from a plain optimizer in two ways that resuming needs: the state is made in the constructor,
    and ``load_state_dict`` restores state but keeps the hyper-parameters given to the constructor, so
    that rates and decay come from the present configuration, not from the checkpoint.

    Args:
        groups: Dicts with ``params``, ``kind`` and any of ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``name``; memory groups also ``clip``, ``method``, ``moments``, ``rounding``, ``seed``.
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
            "kind": "dense", "name": "", "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "clip": None, "method": "adamw", "moments": "lazy", "rounding": "stochastic", "seed": 0,
        }  # fmt: skip
        super().__init__(groups, defaults)
        self._row_gradients = dict(row_gradients or {})
        self._owned: dict[nn.Parameter, Tensor] = {}
        self._seeds: dict[nn.Parameter, int] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["kind"] == "memory":
                    if parameter not in self._row_gradients:
                        raise ValueError("a parameter of a memory group has no row gradient")
                    merging = self._row_gradients[parameter].merging
                    owned = parameter if merging is None else merging.owned()
                    self._owned[parameter] = owned
                    self.state[parameter] = new_state(owned, group)
                    # Tables of one optimizer must not round alike.
                    seed = group["seed"] + len(self._seeds) * 0x9E3779B97F4A7C15
                    self._seeds[parameter] = seed % 2**63
                elif group["kind"] == "dense":
                    self.state[parameter] = self._new_dense_state(parameter)
                else:
                    raise ValueError(f"unknown kind of parameter group: {group['kind']!r}")

    def _new_dense_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        # The fused kernel wants the step on the parameter's device.
        step_device = parameter.device if _fusible(parameter) else torch.device("cpu")
        return {
            "step": torch.tensor(0.0, device=step_device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def row_gradients(self, group: dict[str, Any]) -> list[RowGradient]:
        """The row gradients of a memory group's parameters."""
        return [self._row_gradients[parameter] for parameter in group["params"]]

    def states(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Every parameter and what is kept for it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                yield parameter, self.state[parameter]

    def owned(self, parameter: nn.Parameter) -> Tensor:
        """What this rank updates of a parameter: all that it holds, but for rows that replicas update."""
        return self._owned.get(parameter, parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget dense and row gradients."""
        super().zero_grad(set_to_none)
        for gradient in self._row_gradients.values():
            gradient.clear()

    @torch.no_grad()
    def dense_norm(self) -> Tensor | None:
        """Norm of all dense gradients together, None if there are none."""
        of_meshes = [_norm(parameters) for parameters in by_mesh(self._with_gradient())]
        if len(of_meshes) < 2:
            return of_meshes[0] if of_meshes else None
        return torch.linalg.vector_norm(torch.stack(of_meshes))

    @torch.no_grad()
    def clip_dense(self, max_norm: float, total: Tensor) -> None:
        """Scale the dense gradients down by what ``total``, a norm, is above a limit."""
        for parameters in by_mesh(self._with_gradient()):
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)

    def _with_gradient(self) -> list[nn.Parameter]:
        dense = (p for group in self.param_groups if group["kind"] == "dense" for p in group["params"])
        return [parameter for parameter in dense if parameter.grad is not None]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all()
        return loss

    def _step_all(self) -> None:
        for group in self.param_groups:
            if group["kind"] == "memory":
                self._step_rows(group)
            else:
                self._step_dense(group)

    @torch.no_grad()
    def settle(self) -> None:
        """Make every row pay the weight decay it owes: one pass over the tables, in chunks.

        For values that must be exact where nobody is about to read them in training: before an export, or an
        evaluation that is compared with dense AdamW. Rows that a row filter holds still pay nothing, and owe
        nothing for the steps until now: call this before every change of a filter.
        """
        for group in self.param_groups:
            for parameter in group["params"] if group["kind"] == "memory" else ():
                if "decayed_at" in self.state[parameter]:
                    self._settle(parameter, group)

    def _settle(self, values: nn.Parameter, group: dict[str, Any]) -> None:
        state, gradient = self.state[values], self._row_gradients[values]
        # A step of size zero that pays what is owed and rounds as a step does.
        held = row_state(state)
        owing = RowState(decayed_at=held.decayed_at, master=held.master)
        update = self._row_update(values, group, method="sgd", lr=0.0)
        backend = select(values.device, gradient.kernels)
        table, merging = local(self._owned[values]), gradient.merging
        slots, dim = table.shape
        chunk = min(slots, max(1, _CHUNK_ELEMENTS // max(1, dim)))
        still = table.new_zeros(chunk, dim, dtype=torch.promote_types(table.dtype, torch.float32))
        for start in range(0, slots, chunk):
            end = min(start + chunk, slots)
            rows = torch.arange(start, end, device=table.device, dtype=slot_dtype(slots))
            if gradient.row_filter is not None:
                first = 0 if merging is None else merging.first
                rows = rows[gradient.row_filter[first + start : first + end]]
            sums = RowSums(rows, still[: len(rows)], still.new_zeros(len(rows)))
            backend.update_rows(table, owing, sums, None, update)
        if merging is not None:
            merging.share(torch.arange(slots, device=table.device))
        local(state["decayed_at"]).fill_(update.decay_log)

    def _step_dense(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        fusible = [p for p in parameters if _fusible(p)]
        others = [p for p in parameters if not _fusible(p)]
        for part in (*by_mesh(fusible), *by_mesh(others)):
            states = [self.state[parameter] for parameter in part]
            adamw(
                part,
                [_gradient(parameter) for parameter in part],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=_fusible(part[0]),
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
            state, gradient = self.state[parameter], self._row_gradients[parameter]
            owned, merging = self._owned[parameter], gradient.merging
            state["step"] += 1
            add_decay(state, owned, group["lr"] * group["weight_decay"])
            final = gradient.final()
            if final is None:
                continue
            if merging is not None:  # the kernels take the mean over the columns that they are given
                final = final._replace(squares=final.squares / merging.split)
            backend = select(parameter.device, gradient.kernels)
            update = self._row_update(parameter, group)
            backend.update_rows(local(owned), row_state(state), final, gradient.factor, update)
            if merging is not None:
                merging.share(final.rows)

    def _row_update(self, values: nn.Parameter, group: dict[str, Any], **other: Any) -> RowUpdate:
        state = self.state[values]
        options = {name: group[name] for name in ("method", "lr", "betas", "eps")}
        if (merging := self._row_gradients[values].merging) is not None:
            options |= {"first_row": merging.first, "first_column": merging.first_column}
        return RowUpdate(
            step=int(state["step"]),
            decay_log=float(state["decay_log"]),
            seed=self._seeds[values],
            **(options | other),
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments and step counts; hyper-parameters stay as constructed.

        Raises:
            OptimizerStateError: The saved state has other groups, parameters or shapes, or was made by
                options that keep other tensors.
        """
        saved_groups = state_dict["param_groups"]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != own_sizes:
            raise OptimizerStateError(
                f"optimizer state does not fit: its groups hold {saved_sizes} parameters, "
                f"this optimizer's {own_sizes}"
            )
        pairs = []
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            for number, (parameter, index) in enumerate(
                zip(group["params"], saved_group["params"], strict=True)
            ):
                saved = state_dict["state"].get(index)
                label = f"parameter {number} of group {group['name']!r}"
                check_saved(self.state[parameter], saved, label)
                pairs.append((parameter, saved))
        # Copied into the tensors at hand: torch's own would cast moments to the parameter's dtype, leave
        # step counts on the device they were saved from, and share tensors with the given state.
        for parameter, saved in pairs:
            load_saved(self.owned(parameter), self.state[parameter], saved)


def _fusible(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()


def _norm(parameters: list[Tensor]) -> Tensor:
    """Of the gradients of parameters on one mesh."""
    norm = torch.nn.utils.get_total_norm([_gradient(parameter) for parameter in parameters])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
