"""Options of the decoder that all architectures share."""

from dataclasses import dataclass
from typing import Literal

from memlm.errors import ConfigError


@dataclass
class RopeScaling:
    """Slower rotary positions, by which a model made for short sequences reads longer ones."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: every pair of elements turns slower by factor (arXiv 2306.15595). llama3: only the slow pairs
    do (Llama 3.1). yarn: likewise, with another transition and sharper attention (arXiv 2309.00071)."""
    factor: float
    """How much slower, at least 1."""
    original_length: int | None = None
    """llama3 and yarn, needed: length in tokens of the sequences that the model was made for."""
    slow_turns: float | None = None
    """llama3 and yarn: pairs that turn less often than this in original_length are slowed by factor.
    Default: 1."""
    fast_turns: float | None = None
    """llama3 and yarn: pairs that turn more often keep their speed; those in between are slowed in part.
    Default: 4 for llama3, 32 for yarn."""

    def validate(self) -> None:
        """Check all values against each other.

        Raises:
            ConfigError: Names the key at fault.
        """
        key = "model.transformer.rope_scaling"
        if not self.factor >= 1:
            raise ConfigError(f"{key}.factor", f"is {self.factor}, must be at least 1")
        if self.kind == "linear":
            for name in ("original_length", "slow_turns", "fast_turns"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{key}.{name}", f"is {getattr(self, name)}, but is of no use for kind linear"
                    )
            return
        if self.original_length is None or self.original_length < 1:
            raise ConfigError(
                f"{key}.original_length",
                f"is {self.original_length}, must be at least 1 for kind {self.kind}",
            )
        slow, fast = self.resolved_turns
        if not slow > 0:
            raise ConfigError(f"{key}.slow_turns", f"is {slow}, must be above 0")
        if not fast > slow:
            raise ConfigError(f"{key}.fast_turns", f"is {fast}, must be above slow_turns ({slow})")

    @property
    def resolved_turns(self) -> tuple[float, float]:
        """``slow_turns`` and ``fast_turns``."""
        fast = 4.0 if self.kind == "llama3" else 32.0
        return (
            1.0 if self.slow_turns is None else self.slow_turns,
            fast if self.fast_turns is None else self.fast_turns,
        )


@dataclass
class TransformerConfig:
    """A Llama-style decoder: RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU."""

    dim: int = 256
    """D: model dim, a multiple of heads unless head_dim is given."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention (query) heads."""
    kv_heads: int | None = None
    """Key and value heads of grouped-query attention; divides heads. Default: heads."""
    feed_forward_dim: int | None = None
    """Inner width of the SwiGLU networks. Default: 8/3 of dim, rounded up to a multiple of 256."""
    tie_embeddings: bool = False
    """Whether the output layer uses the token embedding's weight."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of the RMSNorms."""
    head_dim: int | None = None
    """Elements of an attention head, even. Default: dim / heads."""
    attention_bias: bool = False
    """Whether the linear maps to queries, keys and values have a bias (Qwen2); the output map has none."""
    rope_scaling: RopeScaling | None = None
    """Slower rotary positions for sequences longer than those the model was made for. Default: none."""
    vocab_size: int | None = None
    """Rows of the embedding and the output layer. Default: the tokenizer's entries, of which there must not
    be more; checkpoints pad theirs."""
    activation_checkpointing: bool = False
    """Whether training keeps of each block its input alone, and computes the rest once more in the backward
    pass: less memory, a third more time. No part of the architecture."""

    def validate(self) -> None:
        """Check all values against each other.

        Raises:
            ConfigError: Names the key at fault.
        """
        for name in ("dim", "layers", "heads", "kv_heads", "feed_forward_dim", "head_dim", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.transformer.{name}", f"is {value}, must be at least 1")
        for name, low in (("rope_theta", 1), ("norm_eps", 0)):
            value = getattr(self, name)
            if not value > low:
                raise ConfigError(f"model.transformer.{name}", f"is {value}, must be above {low}")
        if self.head_dim is not None and self.head_dim % 2:
            raise ConfigError(
                "model.transformer.head_dim",
                f"is {self.head_dim}, must be even (rotary positions turn pairs of elements of a head)",
            )
        if self.head_dim is None and (self.dim % self.heads or (self.dim // self.heads) % 2):
            raise ConfigError(
                "model.transformer.heads",
                f"is {self.heads}, but dim ({self.dim}) must be an even multiple of it (rotary positions "
                "turn pairs of elements of a head); or give head_dim",
            )
        if self.heads % self.resolved_kv_heads:
            raise ConfigError(
                "model.transformer.kv_heads", f"is {self.kv_heads}, must divide heads ({self.heads})"
            )
        if self.rope_scaling is not None:
            self.rope_scaling.validate()

    @property
    def resolved_head_dim(self) -> int:
        """Elements of an attention head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def resolved_kv_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def resolved_feed_forward_dim(self) -> int:
        """Inner width of the SwiGLU networks."""
        return -(-8 * self.dim // 3 // 256) * 256 if self.feed_forward_dim is None else self.feed_forward_dim
