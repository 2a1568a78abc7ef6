"""Implicit value expansion: several virtual tables over one that is stored.

Ultra-Sparse Memory Network (arXiv 2411.12364), section 3.3.
"""

import torch
from torch import Tensor


def expanded(slots: Tensor, weights: Tensor, rows: int, count: int) -> tuple[Tensor, Tensor]:
    """The weighted reads of each of the virtual tables.

    Virtual slot ``s + e * S`` is row ``s``, multiplied by a matrix ``W_e``. Since the sum over reads and the
    matrices commute, ``sum of w * W_e v = sum over e of W_e (sum of w * v over the reads of table e)``: the
    tables are read apart, and one linear map of all ``E * V`` elements is their projections together.

    Every token becomes ``E`` neighbouring tokens with the same rows, of whose weights all but those of the
    one table are zero. The kernels need no change, and a row is mostly in the cache when it is needed again;
    arithmetic, and sorting in the backward pass, are ``E`` times as much. No row has a gradient that no token
    reads.

    The paper shuffles the virtual slots; here table ``e`` is a contiguous part of the grid of keys.

    Args:
        slots: ``[N, L]`` in ``[0, E * S)``.
        weights: ``[N, L]``.
        rows: ``S``, of the table that is stored.
        count: ``E``; with 1, reads are as they are.

    Returns:
        Rows ``[N * E, L]`` and their weights.
    """
    if count == 1:
        return slots, weights
    own = (slots // rows).unsqueeze(1) == torch.arange(count, device=slots.device).view(1, count, 1)
    parts = torch.where(own, weights.unsqueeze(1), 0.0).flatten(0, 1)
    return (slots % rows).repeat_interleave(count, 0), parts
