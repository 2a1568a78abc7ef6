"""The mixture-of-experts layer."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memlm.cost import Flops, products
from memlm.transformer import grouped, routing
from memlm.transformer.feed_forward import SwiGLU
from memlm.transformer.moe_config import MoEConfig


class Exchange(Protocol):
    """What ranks that hold some of the experts each do; see :mod:`memlm.parallel.expert_exchange`."""

    def apply(
        self,
        rows: Tensor,
        weights: Tensor,
        counts: Tensor,
        products: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Outputs ``[M, D]`` of rows ``[M, D]``, each computed where its expert is."""
        ...

    def own(self, parameter: Tensor) -> Tensor:
        """The experts that this rank holds, of ``[E, ...]``."""
        ...


class MixtureOfExperts(nn.Module):
    """SwiGLU networks of which each token uses a few, chosen by a linear router.

    ``y = sum_e w_e(x) expert_e(x)`` over the experts ``e`` chosen for ``x`` (+ the shared experts). See
    :mod:`memlm.transformer.routing` for the choice. With ``expert_choice`` a token's output depends on later
    tokens while training, and only then.

    The parameters are empty until :meth:`initialise`.

    Args:
        config: Options, valid.
        dim: ``D`` of the model.
        feed_forward_dim: Inner width of an expert for which ``config`` gives none.

    Attributes:
        router: Linear map to the ``E`` logits.
        gate_up: ``[E, 2F, D]``, gate rows first.
        down: ``[E, D, F]``.
        shared: The shared experts, or None.
        exchange: If not None, this rank holds some of the experts, and others the others.
        balance_bias: ``[E]`` fp32 in any precision; only with a ``balance_rate``.
        observers: Functions called with the number of tokens of each expert (``[E]`` int64) at every forward
            pass, after it has been counted. They interrupt a compiled graph: keep them free of host
            synchronisation.
        recording: Whether a forward pass in training counts loads and keeps losses.
    """

    balance_bias: Tensor | None
    counts: Tensor
    seen: Tensor

    def __init__(self, config: MoEConfig, dim: int, feed_forward_dim: int) -> None:
        super().__init__()
        self.config = config
        experts, width = config.experts, config.resolved_expert_dim(feed_forward_dim)
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, width))
        self.shared = SwiGLU(dim, config.shared_experts * width) if config.shared_experts else None
        bias = torch.zeros(experts, dtype=torch.float32) if config.balance_rate else None
        self.register_buffer("balance_bias", bias)
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.exchange: Exchange | None = None
        self.observers: list[Callable[[Tensor], None]] = []
        self.recording = True
        self._losses: dict[str, Tensor] = {}

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D]``, in the dtype of ``hidden`` or that of autocast."""
        tokens = hidden.flatten(0, -2)
        logits = routing.router_logits(tokens, self.router.weight)
        scores = routing.expert_scores(logits, self.config.score)
        groups, weights = self._choose(scores)
        if self.training:
            self._count(groups, logits, scores)
        if self.observers:
            self._observe(groups.counts())
        output = self._experts(tokens, weights, groups).view(hidden.shape)
        return output if self.shared is None else output + self.shared(hidden)

    def _choose(self, scores: Tensor) -> tuple[grouped.Groups, Tensor]:
        config = self.config
        if config.routing == "token_choice":
            return routing.token_choice(scores, config.top_k, config.normalise_weights, self.balance_bias)
        if self.training:
            return routing.expert_choice(scores, config.top_k)
        return routing.token_choice(scores, config.top_k)

    def _experts(self, tokens: Tensor, weights: Tensor, groups: grouped.Groups) -> Tensor:
        """Weighted sums ``[N, D]`` of the outputs of each token's experts."""
        dtype = tokens.dtype
        if torch.is_autocast_enabled(tokens.device.type):  # which does not know grouped products
            dtype = torch.get_autocast_dtype(tokens.device.type)
        rows = grouped.copy_tokens(tokens.to(dtype), groups)
        if self.exchange is None:
            outputs = self._products(rows, weights, groups.ends, self.gate_up, self.down)
        else:
            outputs = self._exchanged(self.exchange, rows, weights, groups)
        return grouped.add_rows(outputs, groups)

    @staticmethod
    def _products(rows: Tensor, weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Weighted outputs of rows sorted by expert."""
        inner = grouped.gated(grouped.product(rows, gate_up.to(rows.dtype), ends), weights)
        return grouped.product(inner, down.to(rows.dtype), ends)

    @torch.compiler.disable
    def _exchanged(self, exchange: Exchange, rows: Tensor, weights: Tensor, groups: grouped.Groups) -> Tensor:
        gate_up, down = exchange.own(self.gate_up), exchange.own(self.down)

        def held(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
            return self._products(rows, weights, ends, gate_up, down)

        return exchange.apply(rows, weights, groups.counts(), held)

    # -- balance

    def _count(self, groups: grouped.Groups, logits: Tensor, scores: Tensor) -> None:
        """Add up a training batch's load, and keep its losses."""
        counts = groups.counts()
        losses = {}
        if self.config.auxiliary_loss:
            losses["auxiliary"] = self.config.auxiliary_loss * routing.balance_loss(scores, counts)
        if self.config.z_loss:
            losses["z"] = self.config.z_loss * routing.z_loss(logits)
        if not self.recording:  # computed once more, for the gradients of those of the first time
            return
        self._losses = losses
        self.counts += counts
        if self.config.routing == "expert_choice":
            self.seen[0] += len(scores)
            self.seen[1] += groups.unchosen()

    @torch.compiler.disable
    def _observe(self, counts: Tensor) -> None:
        for observe in self.observers:
            observe(counts)

    def take_losses(self) -> dict[str, Tensor]:
        """Losses of the last forward pass in training, times their coefficients; a second call gives none.

        Returns:
            Scalars ``auxiliary`` and ``z``, each only if its coefficient is not 0, to be added to the loss.
        """
        losses, self._losses = self._losses, {}
        return losses

    @torch.no_grad()
    def balance(self, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        """Move the bias by the load since the last call, and start to count anew; once an optimizer step.

        ``bias += balance_rate * sign(mean(counts) - counts)`` (arXiv 2408.15664, algorithm 1).

        Args:
            sum_over_ranks: Given the counts ``[E]``, returns their sum over all ranks; without it each rank
                would go its own way.
        """
        if self.balance_bias is not None:
            counts = self.counts if sum_over_ranks is None else sum_over_ranks(self.counts)
            # Times E, in integers: a mean in floating point would not quite equal an even load.
            self.balance_bias += self.config.balance_rate * (counts.sum() - counts * len(counts)).sign()
        self.counts.zero_()
        self.seen.zero_()

    def load(self) -> Tensor:
        """Share ``[E]`` of each expert in all pairs of a token and an expert since the last :meth:`balance`.

        Counted in training; all zero before the first batch.
        """
        return self.counts / self.counts.sum().clamp(min=1)

    def unchosen(self) -> Tensor:
        """Share (scalar) of the tokens that no expert chose since the last :meth:`balance`.

        Counted in training; 0 with ``token_choice``, and before the first batch.
        """
        return self.seen[1] / self.seen[0].clamp(min=1)

    # -- cost and initial values

    def flops(self, sequence_length: int) -> Flops:
        """FLOPs of one token, with ``top_k`` experts (``expert_choice``: on average, in training)."""
        matrices = self.gate_up.shape[1:].numel() + self.down.shape[1:].numel()
        experts = Flops(2 * matrices, 4 * matrices) * self.config.top_k
        shared = products(*self.shared.parameters()) if self.shared is not None else Flops()
        return products(self.router.weight) + experts + shared

    def active_parameters(self) -> int:
        """Parameters that one token uses: router, ``top_k`` experts and the shared ones."""
        return self.flops(1).forward // 2

    def initialise(self, residual_scale: float) -> None:
        """Normal: router, gate and up with std ``D^-1/2``, down with ``F^-1/2 * residual_scale``.

        Bias and load become zero. The shared experts are not filled.
        """
        dim, width = self.down.shape[1:]
        nn.init.normal_(self.router.weight, std=dim**-0.5)
        nn.init.normal_(self.gate_up, std=dim**-0.5)
        nn.init.normal_(self.down, std=width**-0.5 * residual_scale)
        for buffer in (self.balance_bias, self.counts, self.seen):
            if buffer is not None:
                buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MixtureOfExperts":
        """``module.to(dtype)`` and the like: the bias stays in fp32, in which it can move by its rate."""
        before = self.balance_bias
        super()._apply(fn, recurse)
        after = self.balance_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.balance_bias = before.to(after.device) if not before.is_meta else after.to(before.dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot hold losses: these belong to a graph."""
        return self.__dict__ | {"_losses": {}}

    def extra_repr(self) -> str:
        experts, dim, width = self.down.shape
        config = self.config
        return f"experts={experts}, dim={dim}, expert_dim={width}, {config.routing}, top_k={config.top_k}"
