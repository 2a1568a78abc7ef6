"""Where memory stands in a model: in which blocks, how in a block, and over which pools."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from memlm.errors import ConfigError
from memlm.memory.pool import MemoryPool

Mode = Literal["replace", "beside", "before"]
"""How memory stands in a block: in the place of the feed-forward network; beside it, on the same input; or
before attention, on the residual stream."""


class Placed(NamedTuple):
    """A memory layer and the pools it reads, by name."""

    layer: nn.Module
    """Called ``layer(hidden [B, T, D], pools, inputs)``, gives ``[B, T, D]``; a :class:`memlm.cost.Layer`."""
    pools: tuple[str, ...]


class MemoryPlan(Protocol):
    """What the options of a kind of memory offer to the transformer."""

    start_at_zero: bool

    @property
    def placed(self) -> Mode:
        """How its layers stand in a block."""
        ...

    def validate(self, dim: int, depth: int) -> None:
        """Check all options against each other and a model of ``depth`` blocks of ``D = dim``.

        Raises:
            ConfigError: Names the key at fault.
        """
        ...

    def build(self, dim: int, depth: int) -> tuple[dict[str, MemoryPool], dict[int, Placed]]:
        """The pools by name, and the layers by block."""
        ...


@dataclass
class PlacementConfig:
    """Options that every kind of memory has: its blocks and their pools."""

    layers: list[int] | None = None
    """Blocks (from 0) that hold memory. Default: from count and stride."""
    count: int = 3
    """Number of memory layers, placed around the middle of the model; only used if layers is not given."""
    stride: int = 4
    """Distance in blocks between two of them; only used if layers is not given."""
    layer_pools: list[str] | None = None
    """Name of the pool of each memory layer, in their order. Default: all share the pool "main"."""
    start_at_zero: bool = False
    """Whether the layers' output is zero before training, so that a pretrained model to which they are added
    starts unchanged."""

    def validate_placement(self, depth: int) -> None:
        """Check these options against a model of ``depth`` blocks.

        Raises:
            ConfigError: Names the key at fault.
        """
        for name in ("count", "stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.memory.{name}", f"is {getattr(self, name)}, must be at least 1")
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


def build_pools(
    names: Sequence[str],
    slots: int,
    value_dim: int,
    dtype: str,
    kernels: str,
    size_key: str,
    start_at_zero: bool = False,
) -> dict[str, MemoryPool]:
    """One pool for each distinct name.

    Args:
        names: A name for each layer that reads one.
        slots: ``S`` of each pool.
        value_dim: ``V``.
        dtype: Of the values, by name.
        kernels: See :func:`memlm.kernels.backend.select`.
        size_key: YAML key that decides the size, for messages.
        start_at_zero: Whether the values are zero at first.

    Raises:
        ConfigError: There is not enough memory.
    """
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "kernels": kernels,
        "start_at_zero": start_at_zero,
    }
    pools = {}
    for name, readers in Counter(names).items():
        try:
            pools[name] = MemoryPool(slots, value_dim, alone=readers == 1, **options)
        except RuntimeError as error:
            size = slots * value_dim * options["dtype"].itemsize / 2**30
            raise ConfigError(
                size_key,
                f"makes {slots:,} values of {value_dim} elements, {size:,.0f} GiB, "
                "which could not be allocated",
            ) from error
    return pools
