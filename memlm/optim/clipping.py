"""Gradient clipping over dense gradients and row gradients, without a pass over any table."""

import torch
from torch import Tensor

from memlm.optim.memory_adamw import MemoryAdamW


@torch.no_grad()
def clip_gradients(optimizer: MemoryAdamW, dense_clip: float | None) -> dict[str, Tensor]:
    """Scale gradients down whose norm is above its limit.

    The dense parameters are clipped together by ``dense_clip``, each memory group by its own ``clip``:
    the paper clips the values apart from the rest. The norm of a row gradient is exact, since rows are
    summed over layers and micro-batches first.

    Args:
        optimizer: Its groups name their kind and clip.
        dense_clip: Largest norm of all dense gradients together; None or 0 clips nothing.

    Returns:
        Norms before clipping: ``dense`` and one for each memory group's name (scalars on the device).
    """
    norms: dict[str, Tensor] = {}
    dense = [
        parameter.grad
        for group in optimizer.param_groups
        if group["kind"] == "dense"
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if dense:
        norms["dense"] = torch.nn.utils.get_total_norm(dense)
        if dense_clip:
            parameters = [p for g in optimizer.param_groups if g["kind"] == "dense" for p in g["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, dense_clip, norms["dense"])
    for group in optimizer.param_groups:
        if group["kind"] != "memory":
            continue
        gradients = optimizer.row_gradients(group)
        parts = [norm for norm in (gradient.norm() for gradient in gradients) if norm is not None]
        if not parts:
            continue
        norms[group["name"]] = torch.linalg.vector_norm(torch.stack(parts))
        if group["clip"]:
            # The same formula as torch.nn.utils.clip_grads_with_norm_: no branch on the device's value.
            factor = (group["clip"] / (norms[group["name"]] + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.scale_(factor)
    return norms
