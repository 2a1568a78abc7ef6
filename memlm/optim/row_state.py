"""What the row optimizer keeps for a value table under each set of options; how a saved state is loaded."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from memlm.errors import UserError
from memlm.kernels.interface import Method, RowState

Moments = Literal["lazy", "caught_up"]
Rounding = Literal["stochastic", "master"]

# The option of a group that decides whether a tensor is kept, and in which shape.
_OPTION = {
    "exp_avg": "betas[0], which keeps first moments unless it is 0",
    "exp_avg_sq": "method",
    "last_step": "moments",
    "master": "rounding",
}


class OptimizerStateError(UserError, ValueError):
    """A saved optimizer state does not fit the optimizer that loads it."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its part, of any other all."""
    part: Any = tensor
    return part.to_local() if hasattr(part, "to_local") else tensor


def new_state(values: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a table before its first step.

    Beside the tensors of :class:`~memlm.kernels.interface.RowState` there are two scalars on the CPU, where
    reading them waits for no device: ``step``, and ``decay_log`` (fp64), the sum of
    ``log(1 - lr * weight_decay)`` over the steps so far.

    Args:
        values: ``[S, V]``; a DTensor where this rank updates a part of it alone.
        group: The options ``method``, ``moments``, ``rounding``, ``betas`` and ``weight_decay``.

    Raises:
        ValueError: An option has a value that does not exist.
    """
    for option, known in (("method", Method), ("moments", Moments), ("rounding", Rounding)):
        if group[option] not in get_args(known):
            raise ValueError(f"{option} is {group[option]!r}, must be one of {', '.join(get_args(known))}")
    dtype = torch.promote_types(values.dtype, torch.float32)
    state = {
        "step": torch.tensor(0.0, device="cpu"),
        "decay_log": torch.tensor(0.0, dtype=torch.float64, device="cpu"),
    }
    if group["method"] != "sgd":
        if group["betas"][0] > 0:
            state["exp_avg"] = torch.zeros_like(values, dtype=dtype)
        if group["method"] == "adamw":
            state["exp_avg_sq"] = torch.zeros_like(values, dtype=dtype)
        else:
            state["exp_avg_sq"] = _number_a_row(values, 0.0, dtype)
        if group["moments"] == "caught_up":
            state["last_step"] = _number_a_row(values, 0, torch.int32)
    if group["weight_decay"] > 0:
        owe_from_now(state, values)
    if values.dtype == torch.bfloat16 and group["rounding"] == "master":
        state["master"] = values.detach().float()
    return state


def row_state(state: dict[str, Tensor]) -> RowState:
    """The part of a state that the kernels move."""
    held = {name: state.get(name) for name in RowState._fields}
    return RowState(**{name: None if tensor is None else local(tensor) for name, tensor in held.items()})


def owe_from_now(state: dict[str, Tensor], values: Tensor) -> None:
    """Begin to keep what each row owes: nothing so far."""
    state["decayed_at"] = _number_a_row(values, float(state["decay_log"]), torch.float64)


def _number_a_row(values: Tensor, number: float, dtype: torch.dtype) -> Tensor:
    """``[S]``, placed as the rows of ``values`` are, whatever becomes of the columns."""
    part = local(values)
    numbers = part.new_full((part.shape[0],), number, dtype=dtype)
    if part is values:
        return numbers
    from torch.distributed.tensor import DTensor, Replicate

    split: Any = values
    placements = [place if place.is_shard(0) else Replicate() for place in split.placements]
    return DTensor.from_local(
        numbers, split.device_mesh, placements, run_check=False, shape=values.shape[:1], stride=(1,)
    )


def add_decay(state: dict[str, Tensor], values: Tensor, rate: float) -> None:
    """Count one step's decay, ``rate = lr * weight_decay``, as owed by every row."""
    # Lightning moves all of a state but "step" to the device of the parameters.
    state["decay_log"] = state["decay_log"].cpu()
    if rate:
        if rate >= 1:
            raise ValueError(
                f"lr * weight_decay is {rate}, must be below 1: it is the share that one step takes"
            )
        if "decayed_at" not in state:  # weight decay was 0 until now
            owe_from_now(state, values)
        state["decay_log"] += math.log1p(-rate)


def check_saved(own: dict[str, Tensor], saved: dict[str, Any] | None, label: str) -> None:
    """Check that a saved state can be loaded into one made by the present options.

    ``decayed_at`` and ``decay_log`` may be missing on either side: see :func:`load_saved`.

    Args:
        own: The state at hand, of a value table or of a dense parameter.
        saved: What is to be loaded; None for nothing.
        label: Which state this is, for messages.

    Raises:
        OptimizerStateError: Names what is missing or too much, or both shapes.
    """
    if saved is None:
        raise OptimizerStateError(f"optimizer state does not fit: it holds None for {label}")
    optional = {"decayed_at", "decay_log"}
    found = [f"lacks {name}" for name in own if name not in saved and name not in optional]
    found += [f"has {name}" for name in saved if name not in own and name not in optional]
    shapes = {name: (tuple(saved[name].shape), tuple(own[name].shape)) for name in own if name in saved}
    found += [
        f"has {name} of shape {theirs}, expected {ours}"
        for name, (theirs, ours) in shapes.items()
        if theirs != ours
    ]
    if not found:
        return
    options = [
        f"{name} depends on {option}" for name, option in _OPTION.items() if _differs(name, own, saved)
    ]
    hint = "; ".join(options)
    hint = f" ({hint}: give the options it was saved with, or begin anew from the weights)" if options else ""
    raise OptimizerStateError(
        f"optimizer state does not fit: the saved one of {label} {', '.join(found)}{hint}"
    )


def _differs(name: str, own: dict[str, Tensor], saved: dict[str, Any]) -> bool:
    """Whether only another option can explain the difference: another size of the table cannot."""
    if (name in own) != (name in saved):
        return True
    return name in own and own[name].ndim != saved[name].ndim


def load_saved(values: Tensor, own: dict[str, Tensor], saved: dict[str, Any]) -> None:
    """Copy a saved state that :func:`check_saved` found to fit into the tensors at hand.

    What rows owe when the state was saved stays owed, also where the present options have no decay; where
    there was no decay then, they owe nothing until now.
    """
    if "decayed_at" in saved and "decayed_at" not in own:
        owe_from_now(own, values)
    for name, tensor in own.items():
        if name in saved:
            tensor.copy_(saved[name])
    if "decayed_at" in own and "decayed_at" not in saved:
        own["decayed_at"].fill_(float(own["decay_log"]))
