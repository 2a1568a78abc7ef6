"""Tucker-decomposed query-key retrieval: the score of a slot is a bilinear form of two short vectors.

Ultra-Sparse Memory Network (arXiv 2411.12364), section 3.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memlm.cost import Flops
from memlm.errors import ConfigError


@dataclass
class TuckerConfig:
    """Tucker-decomposed retrieval (UltraMem) in the place of product keys."""

    rank: int = 2
    """r: scores of each half key; query and half keys are cut in r parts. Must divide half of the key dim."""
    loss: float = 1e-3
    """Weight of the loss on the core's singular values, all but the largest; 0 for none."""
    margin: float = 0.15
    """Singular values up to this one cost nothing, so that the core does not collapse to rank one."""

    def validate(self, half_key_dim: int) -> None:
        """Check the values against half of the key dim.

        Raises:
            ConfigError: Names the key at fault.
        """
        if self.rank < 2 or half_key_dim % self.rank:
            raise ConfigError(
                "model.memory.tucker.rank",
                f"is {self.rank}, must be at least 2 and divide half of key_dim ({half_key_dim})",
            )
        for name in ("loss", "margin"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"model.memory.tucker.{name}", f"is {getattr(self, name)}, must not be negative"
                )


class TuckerKeys(nn.Module):
    """Half keys with ``r`` scores each, a core, and the search.

    With ``a_i`` and ``b_j`` the ``r`` scores of half key ``i`` of the first set and ``j`` of the second, slot
    ``i * K1 + j`` has the score ``a_i^T core b_j``. The best ``R`` need not lie among the best of each set.
    As in the paper, the core's leading singular vectors ``u`` and ``t`` preselect: the ``R`` half keys of
    each set with the largest ``<u, a_i>`` and ``<t, b_j>``; among their ``R * R`` pairs the search is exact.

    ``(u, t)`` and ``(-u, -t)`` are one singular pair but opposite preselections, and the paper does not say
    which; here it is the one with the larger sum, and the core begins near ``1 / r`` in every element, whose
    leading vectors are positive.

    Every half score has a gradient: unlike that of :class:`ProductKeys`, the backward pass makes two tensors
    of ``N * H * r * K`` elements.

    Args:
        heads: ``H``.
        half_keys: ``K0`` and ``K1``.
        half_key_dim: ``C``, a multiple of the rank.
        reads: ``R``, at most ``K0`` and at most ``K1``.
        config: Rank and loss.

    Attributes:
        keys: ``[H, K0 + K1, C]`` parameter: the first set, then the second.
        core: ``[H, r, r]`` parameter.
    """

    def __init__(
        self, heads: int, half_keys: tuple[int, int], half_key_dim: int, reads: int, config: TuckerConfig
    ) -> None:
        super().__init__()
        self.heads, self.half_keys, self.half_key_dim, self.reads = heads, half_keys, half_key_dim, reads
        self.config = config
        self.keys = nn.Parameter(torch.empty(heads, sum(half_keys), half_key_dim))
        self.core = nn.Parameter(torch.empty(heads, config.rank, config.rank))

    def forward(self, query: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find ``R`` slots of each head.

        Args:
            query: ``[N, H, 2, C]``.
            keys: ``[H, K0 + K1, C]`` to use instead of :attr:`keys` (normalised ones).

        Returns:
            slots: ``[N, H, R]`` int64, in descending order of score.
            scores: ``[N, H, R]``, differentiable in query, keys and core; fp32 (fp64 for fp64).
        """
        with torch.autocast(query.device.type, enabled=False):
            return self._search(query, (self.keys if keys is None else keys).to(query.dtype))

    def _search(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        parts = keys.unflatten(-1, (self.config.rank, -1))
        query = query.unflatten(-1, (self.config.rank, -1))
        dtype = torch.promote_types(query.dtype, torch.float32)
        core = self.core.to(dtype)
        found = []
        leading = self._leading(core.detach())
        for half, (half_keys, vector) in enumerate(zip(parts.split(self.half_keys, 1), leading, strict=True)):
            scores = torch.einsum("nhrc,hkrc->nhrk", query[:, :, half], half_keys).to(dtype)
            order = torch.einsum("nhrk,hr->nhk", scores.detach(), vector).topk(self.reads).indices
            found.append((order, scores.gather(-1, order.unsqueeze(2).expand(-1, -1, scores.shape[2], -1))))
        (first, a), (second, b) = found
        grid = torch.einsum("nhri,hrs,nhsj->nhij", a, core, b)
        scores, chosen = grid.flatten(-2).topk(self.reads)
        slots = first.gather(-1, chosen // self.reads) * self.half_keys[1]
        return slots + second.gather(-1, chosen % self.reads), scores

    @staticmethod
    def _leading(core: Tensor) -> tuple[Tensor, Tensor]:
        left, _, right = torch.linalg.svd(core)
        u, t = left[..., 0], right[..., 0, :]
        sign = torch.where((u + t).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        return u * sign, t * sign

    def take_losses(self) -> dict[str, Tensor]:
        """The weighted loss on the core, ``max(0, singular value - margin)^2``, a mean over heads too.

        Of all singular values but the largest: the smaller they are, the better is the preselection.
        """
        if not self.config.loss:
            return {}
        others = torch.linalg.svdvals(self.core.to(torch.promote_types(self.core.dtype, torch.float32)))[
            :, 1:
        ]
        return {"tucker": self.config.loss * (others - self.config.margin).clamp(min=0).square().mean()}

    def flops(self) -> Flops:
        """Of one token: half scores, preselection and the grid of pairs."""
        rank, reads, width = self.config.rank, self.reads, sum(self.half_keys)
        grid = self.heads * (rank * rank * reads + rank * reads * reads)
        differentiable = self.keys.numel() + grid
        return Flops(2 * (differentiable + self.heads * rank * width), 4 * differentiable)

    def initialise(self, residual_scale: float) -> None:
        """See :class:`memlm.cost.Layer`: of the core; half keys are the memory layer's to fill."""
        nn.init.normal_(self.core, mean=1 / self.config.rank, std=0.1 / self.config.rank)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, half_keys={self.half_keys}, reads={self.reads}, rank={self.config.rank}"
