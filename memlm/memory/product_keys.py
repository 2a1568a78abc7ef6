"""Product keys: the exact top-k among K*K keys, found through two lists of K half keys.

Large Memory Layers with Product Keys (arXiv 1907.05242), section 3.1; Memory Layers at Scale
(arXiv 2412.09764), section 3.1.
"""

import torch
from torch import Tensor, nn

from memlm.kernels.top_k import top_k


def candidate_pairs(reads: int) -> Tensor:
    """The pairs of ranks that can be among the top ``reads`` sums of two sorted lists.

    With both lists in descending order the pair of ranks ``(i, j)`` (from 0) is at most as large as each
    of the ``(i+1)(j+1) - 1`` pairs before it in both lists, so only pairs with ``(i+1)(j+1) <= reads``
    are candidates: 119 instead of 1,024 for 32 reads. Rounded sums keep the order, so this is exact in
    floating point too.

    Returns:
        ``[P, 2]`` int64, row-major.
    """
    pairs = [(i, j) for i in range(reads) for j in range(reads // (i + 1))]
    return torch.tensor(pairs, dtype=torch.int64)


class ProductKeys(nn.Module):
    """Half keys of every head, and the search in them.

    The key of slot ``i * K + j`` is the concatenation of half key ``i`` of the first set and half key
    ``j`` of the second, so its score is the sum of two half scores, and the top ``R`` of all ``K * K``
    sums lie among the pairs of the top ``R`` of each half.

    Args:
        heads: ``H``; each head has half keys of its own.
        half_keys: ``K``, half keys in each of the two sets; the layer addresses ``S = K * K`` slots.
        half_key_dim: ``C``, elements of a half key.
        reads: ``R``, slots each head reads, at most ``K``.

    Attributes:
        keys: ``[H, 2, K, C]`` parameter.
    """

    candidates: Tensor

    def __init__(self, heads: int, half_keys: int, half_key_dim: int, reads: int) -> None:
        super().__init__()
        self.heads, self.half_keys, self.half_key_dim, self.reads = heads, half_keys, half_key_dim, reads
        self.keys = nn.Parameter(torch.empty(heads, 2, half_keys, half_key_dim))
        self.register_buffer("candidates", candidate_pairs(reads), persistent=False)

    def forward(self, query: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the ``R`` best slots of each head.

        Args:
            query: ``[N, H, 2, C]``.
            keys: ``[H, 2, K, C]`` to use instead of :attr:`keys` (normalised ones).

        Returns:
            slots: ``[N, H, R]`` int64, in descending order of score.
            scores: ``[N, H, R]``, differentiable in query and keys; fp32 sums, whatever the dtype of the
                half scores (fp64 for fp64).
        """
        keys = self.keys if keys is None else keys
        # One matrix product for each head and half: [H*2, N, C] x [H*2, C, K].
        half_scores = torch.bmm(
            query.flatten(1, 2).transpose(0, 1), keys.flatten(0, 1).transpose(1, 2).to(query.dtype)
        ).unflatten(0, (self.heads, 2))
        with torch.no_grad():
            chosen = self._best_half_keys(half_scores)
            slots = chosen[:, 0] * self.half_keys + chosen[:, 1]
        # Only here does autograd look, so that the backward pass is one scatter of the scores chosen.
        scores = _at_least_fp32(half_scores.gather(-1, chosen)).sum(1)
        return slots.transpose(0, 1), scores.transpose(0, 1)

    def _best_half_keys(self, half_scores: Tensor) -> Tensor:
        """Indices ``[H, 2, N, R]`` of the two half keys of the best slots; half_scores ``[H, 2, N, K]``."""
        best, index = top_k(half_scores, self.reads)
        best = _at_least_fp32(best)
        left, right = self.candidates.unbind(1)
        sums = best[:, 0].index_select(-1, left) + best[:, 1].index_select(-1, right)
        _, chosen = top_k(sums, self.reads)
        ranks = torch.stack((left[chosen], right[chosen]), dim=1)
        return index.gather(-1, ranks)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, half_keys={self.half_keys}, reads={self.reads}"


def _at_least_fp32(scores: Tensor) -> Tensor:
    """Two bf16 half scores add up to more digits than bf16 has: rounded, ties would be broken wrongly."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
