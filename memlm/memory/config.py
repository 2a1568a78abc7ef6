"""Options of the memory layers."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from memlm.errors import ConfigError
from memlm.kernels.backend import Kernels
from memlm.memory.layer import MemoryLayer, PreValues
from memlm.memory.placement import Mode, Placed, PlacementConfig, build_pools
from memlm.memory.pool import MemoryPool
from memlm.memory.query import QueryNorm
from memlm.memory.tucker import TuckerConfig


@dataclass
class MemoryConfig(PlacementConfig):
    """Memory layers (Memory Layers at Scale, section 3).

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
    pre_values: PreValues = "none"
    """Activation of one-neuron experts (PEER): the weight of each read is multiplied by the activation of the
    dot product of the layer's input and the slot's row in a second pool, "<name>_down". none: no second pool.
    """
    value_expansion: int = 1
    """E: virtual tables over the one that is stored, each with a projection of its own (UltraMem): the keys
    address half_keys * half_keys virtual slots, and the pool has that number divided by E. Above 1 it needs
    projection: true."""
    query_norm: QueryNorm = "none"
    """none, batch (BatchNorm of the query) or qk (queries and half keys normalised, with a learned gain)."""
    tucker: TuckerConfig | None = None
    """Tucker-decomposed retrieval (UltraMem) in the place of product keys. Default: product keys."""
    values_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the value table. bfloat16 halves it; for small updates see model.values_optimizer.rounding."""
    kernels: Kernels = "auto"
    """Which kernels search and read: auto (by device), reference (plain PyTorch), cpu (numba) or triton. The
    environment variable MEMLM_KERNELS overrides it."""
    mode: Literal["replace", "beside"] = "replace"
    """replace: the memory layer stands in the place of the block's feed-forward network (the paper). beside:
    it stands beside it, reads the same input, and their outputs are added (UltraMemV2)."""

    def validate(self, dim: int, depth: int) -> None:
        """Check all values against each other and the model.

        Args:
            dim: ``D`` of the model.
            depth: Number of blocks.

        Raises:
            ConfigError: Names the key at fault.
        """
        for name in ("heads", "reads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.memory.{name}", f"is {getattr(self, name)}, must be at least 1")
        if min(self.key_grid) < 1:
            raise ConfigError("model.memory.half_keys", f"is {self.half_keys}, must be at least 1")
        if self.reads > min(self.key_grid):
            raise ConfigError(
                "model.memory.reads",
                f"is {self.reads}, must be at most half_keys ({min(self.key_grid)})",
            )
        key_dim = self.resolved_key_dim(dim)
        if key_dim < 2 or key_dim % 2:
            raise ConfigError("model.memory.key_dim", f"is {key_dim}, must be even: two half keys share it")
        if self.tucker is not None:
            self.tucker.validate(key_dim // 2)
        value_dim = self.resolved_value_dim(dim)
        if value_dim < 1:
            raise ConfigError("model.memory.value_dim", f"is {value_dim}, must be at least 1")
        if value_dim != dim and not self.projection:
            raise ConfigError(
                "model.memory.value_dim",
                f"is {value_dim}, which differs from model.transformer.dim ({dim}); "
                "that needs model.memory.projection: true",
            )
        if self.value_expansion < 1 or self.virtual_slots % self.value_expansion:
            raise ConfigError(
                "model.memory.value_expansion",
                f"is {self.value_expansion}, must divide the {self.virtual_slots:,} virtual slots",
            )
        if self.value_expansion > 1 and not self.projection:
            raise ConfigError(
                "model.memory.value_expansion",
                f"is {self.value_expansion}: virtual tables differ by their projections; "
                "that needs model.memory.projection: true",
            )
        self.validate_placement(depth)
        for name in self.layer_pools or ():
            if self.has_pre_values and down(name) in (self.layer_pools or ()):
                raise ConfigError(
                    "model.memory.layer_pools",
                    f"{down(name)!r} is the pool of the pre-values of {name!r}; choose another name",
                )

    @property
    def placed(self) -> Mode:
        """How the layers stand in a block."""
        return self.mode

    def build(self, dim: int, depth: int) -> tuple[dict[str, MemoryPool], dict[int, Placed]]:
        """The pools by name, and the memory layers by block."""
        names = self.pool_names(depth)
        size = partial(
            build_pools,
            slots=self.slots,
            dtype=self.values_dtype,
            kernels=self.kernels,
            size_key="model.memory.half_keys",
        )
        pools = size(
            list(names.values()),
            value_dim=self.resolved_value_dim(dim),
            start_at_zero=self.start_at_zero and not self.projection,
        )
        if self.has_pre_values:
            pools |= size([down(name) for name in names.values()], value_dim=dim)
        return pools, {
            block: Placed(MemoryLayer(self, dim), (name, down(name)) if self.has_pre_values else (name,))
            for block, name in names.items()
        }

    def resolved_key_dim(self, dim: int) -> int:
        """Elements of a key, both halves together."""
        return dim // 2 if self.key_dim is None else self.key_dim

    def resolved_value_dim(self, dim: int) -> int:
        """Elements of a value row."""
        return dim if self.value_dim is None else self.value_dim

    @property
    def has_pre_values(self) -> bool:
        """Whether each pool has a second one."""
        return self.pre_values != "none"

    @property
    def key_grid(self) -> tuple[int, int]:
        """``K0`` and ``K1``, half keys in the two sets."""
        return (self.half_keys, self.half_keys) if isinstance(self.half_keys, int) else self.half_keys

    @property
    def virtual_slots(self) -> int:
        """Slots that the keys address."""
        return self.key_grid[0] * self.key_grid[1]

    @property
    def slots(self) -> int:
        """``S``, rows of each pool."""
        return self.virtual_slots // self.value_expansion


def down(pool: str) -> str:
    """Name of the pool that holds the pre-values of another."""
    return f"{pool}_down"
