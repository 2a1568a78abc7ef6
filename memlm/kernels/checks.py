"""What a read may be asked for; the kernels themselves do not look."""

import os

import torch
from torch import Tensor

DEBUG = "MEMLM_DEBUG"
"""Environment variable: 1 also checks on devices where looking at a number waits for all work queued."""


def check_read(values: Tensor, slots: Tensor, weights: Tensor) -> None:
    """Check the arguments of a weighted read.

    Raises:
        ValueError: Says what was found and what was expected.
    """
    if slots.dim() != 2 or slots.shape != weights.shape:
        raise ValueError(
            f"slots and weights of a read must have one shape [tokens, reads], "
            f"not {tuple(slots.shape)} and {tuple(weights.shape)}"
        )
    _check("read", "weights", values, slots, weights)


def check_dot(values: Tensor, slots: Tensor, hidden: Tensor) -> None:
    """Check the arguments of a dot product of rows and hidden states.

    Raises:
        ValueError: Says what was found and what was expected.
    """
    if slots.dim() != 2 or hidden.shape != (slots.shape[0], values.shape[1]):
        raise ValueError(
            f"a dot needs slots [tokens, reads] and hidden states [tokens, {values.shape[1]}], "
            f"not {tuple(slots.shape)} and {tuple(hidden.shape)}"
        )
    _check("dot", "hidden states", values, slots, hidden)


def _check(operation: str, what: str, values: Tensor, slots: Tensor, factors: Tensor) -> None:
    """What is the same for both; ``factors`` are called ``what``."""
    if slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots of a {operation} must be int32 or int64, not {slots.dtype}")
    if not factors.is_floating_point():
        raise ValueError(f"{what} of a {operation} must be floating point, not {factors.dtype}")
    if not (values.device == slots.device == factors.device):
        raise ValueError(
            f"a {operation} needs values, slots and {what} on one device, "
            f"not {values.device}, {slots.device} and {factors.device}"
        )
    if torch.compiler.is_compiling() or slots.device.type == "meta" or not slots.numel():
        return
    if slots.device.type != "cpu" and os.environ.get(DEBUG) != "1":
        return
    least, largest = (int(bound) for bound in torch.aminmax(slots))
    if least < 0 or largest >= values.shape[0]:
        raise ValueError(
            f"slots of a {operation} must be from 0 to {values.shape[0] - 1}, the table's last; "
            f"they go from {least} to {largest}"
        )
    if not torch.isfinite(factors.detach().sum()):
        raise ValueError(
            f"{what} of a {operation} are not all finite: NaN or infinity comes from the layers before"
        )
