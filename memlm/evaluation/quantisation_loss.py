"""What it costs to hold the values of a model in fewer bits, measured in loss."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from memlm.memory.pool import MemoryPool
from memlm.memory.quantised import held_as
from memlm.metrics import IGNORED, summed_loss
from memlm.transformer import Transformer


@torch.no_grad()
def measure_loss(
    model: Transformer, batches: Iterable[dict[str, Any]], formats: Sequence[str]
) -> dict[str, float]:
    """Mean next-token loss with the values of all pools held in each of several formats.

    Args:
        model: In evaluation mode, its values in float32 or bfloat16; it is left as it was.
        batches: With ``tokens`` and ``targets`` ``[B, T]``, and ``documents`` where attention is confined.
            All are kept, and gone through once for each format.
        formats: See :data:`memlm.memory.quantised.FORMATS`.

    Returns:
        Nats a token, by format.

    Raises:
        ValueError: No target is counted, or the values cannot have a format.
    """
    batches = list(batches)
    device = model.embedding.weight.device
    original = dict(model.pools.items())
    losses = {}
    try:
        for format in formats:
            for name, pool in original.items():
                assert isinstance(pool, MemoryPool)
                model.pools[name] = held_as(pool, format)
            nats, counted = 0.0, 0
            for batch in batches:
                documents = batch.get("documents")
                targets = batch["targets"].to(device)
                logits = model(
                    batch["tokens"].to(device), None if documents is None else documents.to(device)
                )
                nats += float(summed_loss(logits, targets).double())
                counted += int((targets != IGNORED).sum())
            if not counted:
                raise ValueError("the batches have no target that counts")
            losses[format] = nats / counted
            # One format's tables at a time.
            for name, pool in original.items():
                model.pools[name] = pool
    finally:
        for name, pool in original.items():
            model.pools[name] = pool
    return losses
