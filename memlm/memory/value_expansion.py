"""Implicit value expansion: several virtual tables over one that is stored.

Ultra-Sparse Memory Network (arXiv 2411.12364), section 3.3.
"""

import torch
from torch import Tensor

from memlm.memory.pool import MemoryPool


def expanded_read(pool: MemoryPool, rows: Tensor, weights: Tensor, tables: Tensor, count: int) -> Tensor:
    """A weighted read for each of the virtual tables.

    Virtual slot ``s + e * S`` is row ``s``, multiplied by a matrix ``W_e``. Since the sum over reads and the
    matrices commute, ``sum of w * W_e v = sum over e of W_e (sum of w * v over the reads of table e)``: the
    tables are read apart, and one linear map of all ``E * V`` elements is their projections together.

    Every token becomes ``E`` neighbouring tokens with the same rows, of whose weights all but those of the
    one table are zero. The kernels need no change, and a row is mostly in the cache when it is needed again;
    arithmetic, and sorting in the backward pass, are ``E`` times as much. No row has a gradient that no token
    reads.

    The paper shuffles the virtual slots; here table ``e`` is a contiguous part of the grid of keys.

    Args:
        pool: ``[S, V]``, the table.
        rows: ``[N, L]`` in ``[0, S)``.
        weights: ``[N, L]``.
        tables: ``[N, L]`` in ``[0, E)``, the virtual table of each read.
        count: ``E``.

    Returns:
        ``[N, E, V]``.
    """
    own = tables.unsqueeze(1) == torch.arange(count, device=tables.device).view(1, count, 1)
    parts = torch.where(own, weights.unsqueeze(1), 0.0).flatten(0, 1)
    read = pool.read(rows.repeat_interleave(count, 0), parts)
    return read.unflatten(0, (rows.shape[0], count))
