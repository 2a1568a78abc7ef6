"""Product keys: the exact top-k among K0*K1 keys, found through two lists of half keys.

Large Memory Layers with Product Keys (arXiv 1907.05242), section 3.1; Memory Layers at Scale
(arXiv 2412.09764), section 3.1.
"""

import torch
from torch import Tensor, nn

from memlm.cost import Flops
from memlm.kernels import operators


class ProductKeys(nn.Module):
    """Half keys of every head, and the search in them.

    The key of slot ``i * K1 + j`` is the concatenation of half key ``i`` of the first set and half key ``j``
    of the second, so its score is the sum of two half scores, and the top ``R`` of all sums lie among the
    pairs of the top ``R`` of each half. Of these only the pairs of ranks ``(i+1)(j+1) <= R`` can win. The
    backward pass touches the selected half keys alone.

    Args:
        heads: ``H``; each head has half keys of its own.
        half_keys: ``K0`` and ``K1``, half keys in each of the two sets; they address ``S = K0 * K1`` slots.
        half_key_dim: ``C``, elements of a half key.
        reads: ``R``, slots each head reads, at most ``K0`` and at most ``K1``.
        kernels: See :func:`memlm.kernels.backend.select`.

    Attributes:
        keys: ``[H, K0 + K1, C]`` parameter: the first set, then the second.
    """

    def __init__(
        self,
        heads: int,
        half_keys: tuple[int, int],
        half_key_dim: int,
        reads: int,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.half_keys, self.half_key_dim, self.reads = heads, half_keys, half_key_dim, reads
        self.kernels = kernels
        self.keys = nn.Parameter(torch.empty(heads, sum(half_keys), half_key_dim))

    def forward(self, query: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the ``R`` best slots of each head.

        Args:
            query: ``[N, H, 2, C]``.
            keys: ``[H, K0 + K1, C]`` to use instead of :attr:`keys` (normalised ones).

        Returns:
            slots: ``[N, H, R]`` int32 (int64 above 2^31 slots), in descending order of score.
            scores: ``[N, H, R]``, differentiable in query and keys; fp32 sums, whatever the dtype of the
                half scores (fp64 for fp64).
        """
        keys = self.keys if keys is None else keys
        scores, slots = operators.search(query, keys, self.half_keys[0], self.reads, self.kernels)
        return slots, scores

    def flops(self) -> Flops:
        """Of one token. The backward pass touches the selected half keys alone."""
        return Flops(2 * self.keys.numel(), 4 * 2 * self.heads * self.reads * self.half_key_dim)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, half_keys={self.half_keys}, reads={self.reads}"
