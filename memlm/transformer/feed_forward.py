"""The dense feed-forward network."""

import torch.nn.functional as F
from torch import Tensor, nn

from memlm.cost import Flops, products


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * x W_up) W_down`` (arXiv 2002.05202); no biases.

    Args:
        dim: ``D`` of the model.
        inner_dim: Width of the gate and up projections.
    """

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, inner_dim, bias=False)
        self.up = nn.Linear(dim, inner_dim, bias=False)
        self.down = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))

    def flops(self, sequence_length: int) -> Flops:
        """See :class:`memlm.cost.Layer`."""
        return products(self.gate.weight, self.up.weight, self.down.weight)

    def active_parameters(self) -> int:
        """See :class:`memlm.cost.Layer`: all."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, residual_scale: float) -> None:
        """See :class:`memlm.cost.Layer`: normal, std ``fan_in^-1/2``."""
        for linear, scale in ((self.gate, 1.0), (self.up, 1.0), (self.down, residual_scale)):
            nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
