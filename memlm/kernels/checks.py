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
    if slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots of a read must be int32 or int64, not {slots.dtype}")
    if not weights.is_floating_point():
        raise ValueError(f"weights of a read must be floating point, not {weights.dtype}")
    if not (values.device == slots.device == weights.device):
        raise ValueError(
            f"a read needs values, slots and weights on one device, "
            f"not {values.device}, {slots.device} and {weights.device}"
        )
    if torch.compiler.is_compiling() or slots.device.type == "meta":
        return
    if slots.device.type == "cpu" or os.environ.get(DEBUG) == "1":
        _check_numbers(values.shape[0], slots, weights)


def _check_numbers(num_slots: int, slots: Tensor, weights: Tensor) -> None:
    if not slots.numel():
        return
    least, largest = (int(bound) for bound in torch.aminmax(slots))
    if least < 0 or largest >= num_slots:
        raise ValueError(
            f"slots of a read must be from 0 to {num_slots - 1}, the table's last; "
            f"they go from {least} to {largest}"
        )
    if not torch.isfinite(weights.detach().sum()):
        raise ValueError("weights of a read are not all finite: NaN or infinity comes from the layers before")
