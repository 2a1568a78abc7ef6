"""Gradient clipping over dense gradients and row gradients, without a pass over any table."""

import torch
from torch import Tensor

from memlm.optim.memory_adamw import MemoryAdamW


@torch.no_grad()
def clip_gradients(optimizer: MemoryAdamW, max_norm: float | None) -> dict[str, Tensor]:
    """Scale gradients down whose norm is above its limit.

    The dense parameters are clipped together to ``max_norm``. A memory group's ``clip`` says what happens to
    its rows: a number clips them apart, by their own norm, as the paper does; ``global`` adds them to the
    dense gradients, one norm for all, clipped to ``max_norm``; None leaves them alone. The norm of a row
    gradient is exact, since rows are summed over layers and micro-batches first, and costs one number a row:
    their squares are known from the summation, and the factor is left for the update to apply.

    Args:
        optimizer: Its groups name their kind and clip.
        max_norm: Largest norm of the dense gradients and of the groups that join them; None or 0 clips
            nothing of these.

    Returns:
        Norms before clipping: ``dense``, one for each memory group's name, and ``global`` where rows have
        joined the dense gradients (scalars on the device).
    """
    norms: dict[str, Tensor] = {}
    together, joined = [], []
    dense = optimizer.dense_norm()
    if dense is not None:
        norms["dense"] = dense
        together.append(dense)
    for group in optimizer.param_groups:
        if group["kind"] != "memory":
            continue
        gradients = optimizer.row_gradients(group)
        parts = [norm for norm in (gradient.norm() for gradient in gradients) if norm is not None]
        if not parts:
            continue
        norm = norms[group["name"]] = torch.linalg.vector_norm(torch.stack(parts))
        if group["clip"] == "global":
            together.append(norm)
            joined += gradients
        elif group["clip"]:
            for gradient in gradients:
                gradient.scale_(_factor(norm, group["clip"]))
    if joined:
        norms["global"] = torch.linalg.vector_norm(torch.stack(together))
    if max_norm and together:
        total = norms["global"] if joined else norms["dense"]
        optimizer.clip_dense(max_norm, total)
        for gradient in joined:
            gradient.scale_(_factor(total, max_norm))
    return norms


def _factor(norm: Tensor, max_norm: float) -> Tensor:
    """The formula of torch.nn.utils.clip_grads_with_norm_: no branch on the device's value."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
