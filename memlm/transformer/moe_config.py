"""Options of the mixture-of-experts layers, and where they stand in the model."""

from dataclasses import dataclass
from typing import Literal, get_args

from memlm.errors import ConfigError

Routing = Literal["expert_choice", "token_choice"]
Score = Literal["softmax", "sigmoid"]

STRIDE = 8
"""Of these elements dims are multiples: rows of grouped products start every 16 bytes, 8 elements of bf16."""


@dataclass
class MoEConfig:
    """Mixtures of experts in the place of feed-forward networks.

    The defaults are the baseline of Memory Layers at Scale (arXiv 2412.09764, section 4.1). Mixtral is
    ``routing: token_choice``, ``top_k: 2``, ``normalise_weights: true``; OLMoE ``experts: 64``,
    ``routing: token_choice``, ``top_k: 8`` with a smaller ``expert_dim``.
    """

    experts: int = 8
    """E: experts, each a SwiGLU network of its own."""
    routing: Routing = "expert_choice"
    """expert_choice: in training every expert takes the tokens of the batch that score best with it, of later
    positions too, so that training sees the future; in evaluation each token takes its top_k best
    experts (the paper: one). token_choice: every token takes its top_k best experts."""
    top_k: int = 1
    """Experts that a token uses, at most experts; for expert_choice on average: an expert takes
    tokens * top_k / experts tokens of a batch, rounded up."""
    expert_dim: int | None = None
    """F: inner width of an expert, a multiple of 8. Default: that of the dense SwiGLU networks. Smaller ones
    with more experts and a larger top_k are fine-grained experts."""
    shared_experts: int = 0
    """Experts that every token uses beside those chosen, as one SwiGLU network of that many times
    expert_dim."""
    normalise_weights: bool = False
    """Whether the weights of a token's top_k experts are divided by their sum (Mixtral does, OLMoE and Switch
    do not). Only for token_choice."""
    score: Score = "softmax"
    """What makes a router's outputs the weights of the experts: softmax over the experts, or sigmoid of each
    by itself (DeepSeek-V3)."""
    auxiliary_loss: float = 0.0
    """Coefficient of the load-balance loss of Switch Transformers, which is 1 for an even load; usual: 0.01.
    0: none. Only for token_choice."""
    z_loss: float = 0.0
    """Coefficient of the router z-loss of ST-MoE, which keeps the router's outputs small; usual: 0.001.
    0: none."""
    balance_rate: float = 0.0
    """By how much a bias on an expert's score, used for choosing only, moves in every optimizer step, up for
    experts with less than the mean load and down for the others (DeepSeek-V3); usual: 0.001. 0: no bias. Only
    for token_choice."""
    layers: list[int] | None = None
    """Blocks (from 0) whose feed-forward network is a mixture of experts. Default: all."""

    def validate(self, dim: int, depth: int, feed_forward_dim: int) -> None:
        """Check all values against each other and the model.

        Args:
            dim: ``D`` of the model.
            depth: Number of blocks.
            feed_forward_dim: Inner width of the dense SwiGLU networks.

        Raises:
            ConfigError: Names the key at fault.
        """
        for name, kind in (("routing", Routing), ("score", Score)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"model.moe.{name}", f"is {getattr(self, name)}, must be {' or '.join(get_args(kind))}"
                )
        if self.experts < 2:
            raise ConfigError("model.moe.experts", f"is {self.experts}, must be at least 2; one is a DenseLM")
        if self.top_k < 1:
            raise ConfigError("model.moe.top_k", f"is {self.top_k}, must be at least 1")
        if self.top_k > self.experts:
            raise ConfigError("model.moe.top_k", f"is {self.top_k}, must be at most experts ({self.experts})")
        for name in ("shared_experts", "auxiliary_loss", "z_loss", "balance_rate"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"model.moe.{name}", f"is {getattr(self, name)}, must not be negative")
        self._validate_dims(dim, feed_forward_dim)
        self._refuse_what_would_do_nothing()
        placement = self.placement(depth)
        if not placement:
            raise ConfigError("model.moe.layers", "is empty; name at least one block, or use DenseLM")
        if len(set(placement)) != len(placement) or placement != sorted(placement):
            raise ConfigError("model.moe.layers", f"is {placement}, must be ascending without repeats")
        if placement[0] < 0 or placement[-1] >= depth:
            raise ConfigError(
                "model.moe.layers",
                f"is {placement}, but model.transformer.layers is {depth} (blocks 0 to {depth - 1})",
            )

    def _validate_dims(self, dim: int, feed_forward_dim: int) -> None:
        why = "grouped products need rows of a multiple of 16 bytes"
        if dim < 1 or dim % STRIDE:
            raise ConfigError(
                "model.transformer.dim", f"is {dim}, must be a multiple of {STRIDE} with model.moe: {why}"
            )
        width = self.resolved_expert_dim(feed_forward_dim)
        if width < 1 or width % STRIDE:
            default = " (model.transformer.feed_forward_dim)" if self.expert_dim is None else ""
            raise ConfigError(
                "model.moe.expert_dim", f"is {width}{default}, must be a positive multiple of {STRIDE}: {why}"
            )

    def _refuse_what_would_do_nothing(self) -> None:
        balancing = ("auxiliary_loss", "balance_rate")
        if self.routing == "expert_choice":
            for name in (*balancing, "normalise_weights"):
                if getattr(self, name):
                    reason = (
                        "experts that choose have an even load"
                        if name in balancing
                        else "the weights of experts that choose are not normalised"
                    )
                    raise ConfigError(
                        f"model.moe.{name}",
                        f"is {getattr(self, name)}, but model.moe.routing is expert_choice: {reason}",
                    )
        if self.top_k == self.experts:
            for name in balancing:
                if getattr(self, name):
                    raise ConfigError(
                        f"model.moe.{name}",
                        f"is {getattr(self, name)}, but every token uses all experts: top_k and experts are "
                        f"both {self.experts}, and the load is even",
                    )
        if self.normalise_weights and self.top_k == 1:
            raise ConfigError(
                "model.moe.normalise_weights",
                "is True, but top_k is 1: every weight would be 1, and the router would not learn from the "
                "loss",
            )

    def placement(self, depth: int) -> list[int]:
        """The blocks that hold experts, ascending."""
        return list(range(depth)) if self.layers is None else list(self.layers)

    def resolved_expert_dim(self, feed_forward_dim: int) -> int:
        """Inner width of an expert, for dense SwiGLU networks of ``feed_forward_dim``."""
        return feed_forward_dim if self.expert_dim is None else self.expert_dim
