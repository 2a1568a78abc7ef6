"""The dense feed-forward network."""

import torch.nn.functional as F
from torch import Tensor, nn


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
