"""Options of the memory layers, and where they stand in the model."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from memlm.errors import ConfigError
from memlm.kernels.backend import Kernels
from memlm.memory.query import QueryNorm


@dataclass
class MemoryConfig:
    """Memory layers in the place of feed-forward networks (Memory Layers at Scale, section 3).

    The defaults are the paper's Memory+. Its vanilla Memory is ``gate: none``, ``projection: false``,
    ``count: 1``, ``key_dim: 256``.
    """

    half_keys: int | tuple[int, int] = 1024
    """K: half keys in each of the two sets of a head; the pool has K * K slots. Two numbers [K0, K1] give the
    sets different sizes, and the pool K0 * K1 slots."""
    heads: int = 4
    """H: heads, each with a query and half keys of its own; their reads are summed."""
    reads: int = 32
    """R: slots that each head reads for a token, at most half_keys."""
    key_dim: int | None = None
    """Elements of a key, both halves together, even. Default: half of the model dim (the paper's Memory+)."""
    value_dim: int | None = None
    """V: elements of a value row. Default: the model dim. Another one needs projection: true."""
    gate: Literal["silu", "none"] = "silu"
    """silu: the read is multiplied by silu of a linear map of the layer's input. none: it is not."""
    projection: bool = True
    """Whether a linear map from value dim to model dim follows the read (and the gate)."""
    query_norm: QueryNorm = "none"
    """none, batch (BatchNorm of the query) or qk (queries and half keys normalised, with a learned gain)."""
    values_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the value table. bfloat16 halves it; for small updates see model.values_optimizer.rounding."""
    kernels: Kernels = "auto"
    """Which kernels search and read: auto (by device), reference (plain PyTorch), cpu (numba) or triton. The
    environment variable MEMLM_KERNELS overrides it."""
    layers: list[int] | None = None
    """Blocks (from 0) whose feed-forward network a memory layer replaces. Default: from count and stride."""
    count: int = 3
    """Number of memory layers, placed around the middle of the model; only used if layers is not given."""
    stride: int = 4
    """Distance in blocks between two of them; only used if layers is not given."""
    layer_pools: list[str] | None = None
    """Name of the pool of each memory layer, in their order. Default: all share the pool "main"."""

    def validate(self, dim: int, depth: int) -> None:
        """Check all values against each other and the model.

        Args:
            dim: ``D`` of the model.
            depth: Number of blocks.

        Raises:
            ConfigError: Names the key at fault.
        """
        for name in ("heads", "reads", "count", "stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.memory.{name}", f"is {getattr(self, name)}, must be at least 1")
        if min(self.key_grid) < 1:
            raise ConfigError("model.memory.half_keys", f"is {self.half_keys}, must be at least 1")
        if self.reads > min(self.key_grid):
            raise ConfigError(
                "model.memory.reads", f"is {self.reads}, must be at most half_keys ({self.half_keys})"
            )
        key_dim = self.resolved_key_dim(dim)
        if key_dim < 2 or key_dim % 2:
            raise ConfigError("model.memory.key_dim", f"is {key_dim}, must be even: two half keys share it")
        value_dim = self.resolved_value_dim(dim)
        if value_dim < 1:
            raise ConfigError("model.memory.value_dim", f"is {value_dim}, must be at least 1")
        if value_dim != dim and not self.projection:
            raise ConfigError(
                "model.memory.value_dim",
                f"is {value_dim}, which differs from model.transformer.dim ({dim}); "
                "that needs model.memory.projection: true",
            )
        placement = self.placement(depth)
        if not placement:
            raise ConfigError("model.memory.layers", "is empty; name at least one block, or use DenseLM")
        if len(set(placement)) != len(placement) or placement != sorted(placement):
            raise ConfigError("model.memory.layers", f"is {placement}, must be ascending without repeats")
        if placement[0] < 0 or placement[-1] >= depth:
            key = "layers" if self.layers is not None else "stride"
            raise ConfigError(
                f"model.memory.{key}",
                f"places memory in blocks {placement}, but model.transformer.layers is {depth} "
                f"(blocks 0 to {depth - 1})",
            )
        if self.layer_pools is not None and len(self.layer_pools) != len(placement):
            raise ConfigError(
                "model.memory.layer_pools",
                f"names {len(self.layer_pools)} pools for {len(placement)} memory layers; give one for each",
            )
        for name in self.layer_pools or []:
            if not name.isidentifier():
                raise ConfigError(
                    "model.memory.layer_pools", f"{name!r} is not a name (letters, digits, underscores)"
                )
            if hasattr(nn.ModuleDict, name) or name == "training":
                raise ConfigError(
                    "model.memory.layer_pools",
                    f"{name!r} is an attribute of torch modules; choose another name",
                )

    def placement(self, depth: int) -> list[int]:
        """The blocks that hold memory, ascending: as listed, or ``count`` of them centred, ``stride`` apart.

        Reproduces the paper's placements: 4, 12, 20 of 24 blocks for count 3 and stride 8, the middle
        block for count 1.
        """
        if self.layers is not None:
            return list(self.layers)
        first = (depth - (self.count - 1) * self.stride) // 2
        return [first + i * self.stride for i in range(self.count)]

    def pool_names(self, depth: int) -> dict[int, str]:
        """Name of the pool for each block that holds memory."""
        placement = self.placement(depth)
        return dict(zip(placement, self.layer_pools or ["main"] * len(placement), strict=True))

    def resolved_key_dim(self, dim: int) -> int:
        """Elements of a key, both halves together."""
        return dim // 2 if self.key_dim is None else self.key_dim

    def resolved_value_dim(self, dim: int) -> int:
        """Elements of a value row."""
        return dim if self.value_dim is None else self.value_dim

    @property
    def key_grid(self) -> tuple[int, int]:
        """``K0`` and ``K1``, half keys in the two sets."""
        return (self.half_keys, self.half_keys) if isinstance(self.half_keys, int) else self.half_keys

    @property
    def slots(self) -> int:
        """Rows of each pool."""
        return self.key_grid[0] * self.key_grid[1]
