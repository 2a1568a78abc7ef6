"""Options of the decoder that all architectures share."""

from dataclasses import dataclass

from memlm.errors import ConfigError


@dataclass
class TransformerConfig:
    """A Llama-style decoder: RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU."""

    dim: int = 256
    """D: model dim, a multiple of heads."""
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

    def validate(self) -> None:
        """Check all values against each other.

        Raises:
            ConfigError: Names the key at fault.
        """
        for name in ("dim", "layers", "heads", "kv_heads", "feed_forward_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.transformer.{name}", f"is {value}, must be at least 1")
        for name, low in (("rope_theta", 1), ("norm_eps", 0)):
            value = getattr(self, name)
            if not value > low:
                raise ConfigError(f"model.transformer.{name}", f"is {value}, must be above {low}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ConfigError(
                "model.transformer.heads",
                f"is {self.heads}, but dim ({self.dim}) must be an even multiple of it (rotary positions "
                "turn pairs of elements of a head)",
            )
        if self.heads % self.resolved_kv_heads:
            raise ConfigError(
                "model.transformer.kv_heads", f"is {self.kv_heads}, must divide heads ({self.heads})"
            )

    @property
    def head_dim(self) -> int:
        """Elements of an attention head."""
        return self.dim // self.heads

    @property
    def resolved_kv_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def resolved_feed_forward_dim(self) -> int:
        """Inner width of the SwiGLU networks."""
        return -(-8 * self.dim // 3 // 256) * 256 if self.feed_forward_dim is None else self.feed_forward_dim
