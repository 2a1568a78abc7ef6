"""Bytes that a rank sends for experts split over groups; see :mod:`memlm.parallel.traffic`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from memlm.parallel.expert_split import split_experts
from memlm.rank_memory import Mesh
from memlm.transformer import Transformer


@dataclass(frozen=True)
class Routed:
    """Rows, pairs of a token and an expert, that a rank exchanges with its group in one layer in a step."""

    leaving: float
    """Rows of its tokens that other ranks' experts compute."""
    coming: float
    """Rows of other ranks' tokens that its experts compute."""

    @classmethod
    def even(cls, rows: float, ranks: int) -> "Routed":
        """Where every expert has as many rows of each rank: ``rows`` of them in all."""
        return cls(rows * (ranks - 1) / ranks, rows * (ranks - 1) / ranks)


def expert_rows(
    model: Transformer,
    mesh: Mesh,
    tokens: int,
    micro_batches: int,
    autocast: torch.dtype | None = None,
    routed: Mapping[int, Routed] | None = None,
) -> float:
    """Bytes of the rows that a rank sends in a step, forward and backward.

    Args:
        model: In the dtypes that it trains in.
        mesh: How it is spread.
        tokens: Tokens of the rank in the step.
        micro_batches: Forward passes of the step.
        autocast: What autocast computes in, None for none.
        routed: Rows exchanged, by block; otherwise those of even loads.
    """
    group = mesh.expert_group
    if group == 1:
        return 0.0
    total = 0.0
    for index, layer in model.experts.items():
        experts, dim, _ = layer.down.shape
        row = dim * (autocast or layer.down.dtype).itemsize
        weight = torch.promote_types(layer.router.weight.dtype, torch.float32).itemsize
        exchanged = Routed.even(tokens * layer.config.top_k, group) if routed is None else routed[index]
        # Forward: rows and weights there, outputs back. Backward: their gradients the other way.
        there, back = exchanged.leaving * (row + weight), exchanged.coming * row
        grad_there, grad_back = exchanged.leaving * row, exchanged.coming * (row + weight)
        counts = 8 * experts * (group - 1) / group * micro_batches
        total += there + back + grad_there + grad_back + counts
    return total


def expert_matrices(model: Transformer, mesh: Mesh) -> tuple[float, float]:
    """Bytes of the experts' matrices of all blocks, and of their gradients, in one micro-batch.

    They are gathered over the ranks that hold the same experts, ``W / G``, once more for the backward pass.
    """
    weights = gradients = 0.0
    others = mesh.ranks // mesh.expert_group - 1
    for parameter in split_experts(model, mesh.expert_group).values():
        part = parameter.numel() * parameter.element_size() / mesh.ranks
        weights += 2 * part * others
        gradients += part * others if parameter.requires_grad else 0.0
    return weights, gradients
