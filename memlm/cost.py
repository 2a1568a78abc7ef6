"""What a layer reports about its cost: FLOPs of a token, counted and not measured.

A multiply-add is two FLOPs. Matrix products, attention and reads of a pool count; elementwise work does not,
as in ``torch.utils.flop_counter``.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token."""

    forward: int = 0
    """Of the forward pass."""
    backward: int = 0
    """Of the backward pass, all parameters and the input having a gradient."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.forward * times, self.backward * times)


def products(*weights: Tensor) -> Flops:
    """Of a token multiplied with each of these matrices; backwards once for its gradient, once for theirs."""
    elements = sum(weight.numel() for weight in weights)
    return Flops(2 * elements, 4 * elements)


class Layer(Protocol):
    """What the parts of a block offer beside ``forward``."""

    def flops(self, sequence_length: int) -> Flops:
        """FLOPs of one token in a sequence of ``sequence_length``, reads of pools left out."""
        ...

    def active_parameters(self) -> int:
        """Parameters of this layer that one token uses, rows of pools left out."""
        ...

    def initialise(self, residual_scale: float) -> None:
        """Fill its own parameters and buffers (not those of child layers that have this method themselves).

        Args:
            residual_scale: Factor on what writes to the residual stream, ``(2 * layers)^-0.5``.
        """
        ...
