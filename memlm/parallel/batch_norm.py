"""BatchNorm over the tokens of all ranks; torch's own SyncBatchNorm works on GPUs alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm(nn.BatchNorm1d):
    """``BatchNorm1d`` of ``[N, C]`` whose means and variances in training are those of all ranks' tokens.

    All ranks have equally many tokens. Statistics are computed in fp32 at least.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C]`` to ``[N, C]``."""
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = len(x) * dist.get_world_size()
        mean = _SumOverRanks.apply(wide.sum(0)) / count
        centred = wide - mean
        variance = _SumOverRanks.apply(centred.square().sum(0)) / count
        if self.num_batches_tracked is not None:  # it is where activation checkpointing computes all again
            self._keep(mean.detach(), variance.detach() * count / max(count - 1, 1))
        normed = centred * (variance + self.eps).rsqrt()
        return (normed * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


def synchronise(model: nn.Module) -> None:
    """Make every BatchNorm of a model one over all ranks, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SyncedBatchNorm
