"""What one rank holds while it trains: weights, gradients and optimizer state, in bytes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from memlm.errors import ConfigError
from memlm.memory import MemoryPool
from memlm.optim import MemoryAdamW
from memlm.parallel.dense_split import share
from memlm.parallel.expert_split import check_experts, split_experts
from memlm.transformer import Block, Transformer

_DTYPES: dict[str, torch.dtype | None] = {
    "32-true": None, "32": None, "None": None, "bf16-mixed": None, "bf16": None, "16-mixed": None, "16": None,
    "bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64,
}  # fmt: skip
_AUTOCAST = {
    "bf16-mixed": torch.bfloat16,
    "bf16": torch.bfloat16,
    "16-mixed": torch.float16,
    "16": torch.float16,
}


def autocast_dtype(precision: Any) -> torch.dtype | None:
    """What products are computed in under a ``trainer.precision``, if that is not their own dtype."""
    return _AUTOCAST.get(str(precision))


def convert(model: nn.Module, precision: Any) -> None:
    """Give a model's parameters the dtype that Lightning gives them.

    Under mixed precision they keep their own; a "true" precision converts all of them, value tables too.

    Args:
        model: May be on the meta device.
        precision: A value of ``trainer.precision``.

    Raises:
        ConfigError: It cannot be counted.
    """
    if str(precision) not in _DTYPES:
        known = ", ".join(name for name in _DTYPES if "-" in name)
        raise ConfigError("precision", f"is {precision}, which cannot be counted; known are {known}")
    dtype = _DTYPES[str(precision)]
    if dtype is not None:
        model.to(dtype)


@dataclass(frozen=True)
class Mesh:
    """How parameters are spread over ranks."""

    ranks: int = 1
    """W: processes that train, one for each device."""
    memory_group: int = 1
    """G: ranks that share one copy of the value tables, each with a slice of every row; divides ranks."""
    shard_dense: bool = False
    """Whether the other parameters are split over all ranks too (FSDP)."""
    expert_group: int = 1
    """Ranks that share one copy of the experts, each with some of them; divides ranks. 1: not split so."""
    wire_dtype: torch.dtype | None = None
    """What memory's wider floating-point numbers are sent as; None: as they are."""
    whole_gradients: bool = True
    """Whether accumulated micro-batches add up whole dense gradients, which are sent once a step; otherwise
    after each micro-batch. Makes no difference without shard_dense, or without accumulation."""

    def __post_init__(self) -> None:
        for name in ("ranks", "memory_group", "expert_group"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"is {getattr(self, name)}, must be at least 1")
        if self.ranks % self.memory_group:
            raise ConfigError("memory_group", f"is {self.memory_group}, must divide ranks ({self.ranks})")
        if self.ranks % self.expert_group:
            raise ConfigError("expert_group", f"is {self.expert_group}, must divide ranks ({self.ranks})")
        if self.expert_group > 1 and not self.shard_dense:
            raise ConfigError(
                "expert_group",
                f"is {self.expert_group}, and goes with shard_dense true, as in memory_parallel",
            )


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that holds most, activations and buffers of communication left out."""

    dense_weights: int
    """All parameters but the value tables."""
    dense_gradients: int
    """Their gradients; of split parameters whole while micro-batches add them up."""
    dense_state: int
    """Their optimizer state: two moments in the parameters' dtype, and a step count each."""
    values: int
    """The value tables."""
    row_gradients: int
    """Sums of the rows that the memory group reads, at most: every read of another row. Of several groups
    also the sums over all of them of the rows that this rank updates."""
    values_state: int
    """Optimizer state of the value tables, as their options have it."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    def as_dict(self) -> dict[str, int]:
        """Plain dict with the total, for JSON."""
        return {**asdict(self), "total": self.total}


def rank_memory(
    model: Transformer, optimizer: MemoryAdamW, mesh: Mesh, tokens: int, micro_batches: int = 1
) -> RankMemory:
    """Count what a rank holds; works on the meta device.

    A rank of a memory group of ``G`` holds ``V / G`` columns of every value. What the optimizer keeps for the
    values is split over all ranks: its columns over the group, its rows over the ``W / G`` groups.

    Args:
        model: In the dtypes that it trains in.
        optimizer: Over the model's parameters; its state is made.
        mesh: How they are spread.
        tokens: Tokens of one rank in an optimizer step.
        micro_batches: Backward passes of a step.

    Raises:
        ConfigError: The ranks of a memory group do not divide the elements of a value, or those of an expert
            group the experts.
    """
    pools = {name: cast(MemoryPool, pool) for name, pool in model.pools.items()}
    tables = {id(pool.values) for pool in pools.values()}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    check_experts(model, mesh.ranks, mesh.expert_group, "expert_group")
    experts = split_experts(model, mesh.expert_group)

    def held(parameter: nn.Parameter, tensor: Tensor) -> int:
        """Bytes of the largest share of a tensor that is placed as a parameter is."""
        if id(parameter) in experts and tensor.ndim:  # over the group, and again over the groups, evenly
            return tensor.numel() // mesh.ranks * tensor.element_size()
        return share(tensor.shape, mesh.ranks if mesh.shard_dense else 1) * tensor.element_size()

    def gradient(parameter: nn.Parameter) -> int:
        """Bytes of its gradient where that is largest."""
        if not mesh.shard_dense or not mesh.whole_gradients or micro_batches == 1:
            return held(parameter, parameter)
        of_rank = parameter.numel() // (mesh.expert_group if id(parameter) in experts else 1)
        return of_rank * parameter.element_size()

    group, groups = mesh.memory_group, mesh.ranks // mesh.memory_group
    for name, pool in pools.items():
        if pool.value_dim % group:
            raise ConfigError(
                "memory_group",
                f"is {group}, must divide the {pool.value_dim} elements of a value of pool {name!r}",
            )
    reads = reads_per_token(model)
    return RankMemory(
        dense_weights=sum(held(p, p) for p in dense),
        dense_gradients=sum(gradient(p) for p in dense if p.requires_grad),
        dense_state=sum(held(p, state) for p in dense for state in optimizer.state.get(p, {}).values()),
        values=_bytes((pool.values for pool in pools.values()), 1, group),
        row_gradients=sum(
            (
                min(reads[name] * tokens * group, pool.slots)
                + (-(-min(reads[name] * tokens * mesh.ranks, pool.slots) // groups) if groups > 1 else 0)
            )
            * (pool.value_dim // group)
            * torch.promote_types(pool.values.dtype, torch.float32).itemsize
            for name, pool in pools.items()
            if pool.values.requires_grad
        ),
        values_state=_bytes(
            (state for pool in pools.values() for state in optimizer.state.get(pool.values, {}).values()),
            groups,
            group,
        ),
    )


def reads_per_token(model: Transformer) -> Counter[str]:
    """Rows that one token reads of each pool, over all layers."""
    reads: Counter[str] = Counter()
    for block in cast(Iterable[Block], model.blocks):
        for name in block.pool_names:
            reads[name] += cast(int, cast(nn.Module, block.memory).rows_read)
    return reads


def _bytes(tensors: Iterable[Tensor], rows: int, columns: int = 1) -> int:
    """Of the largest share of each: first dimension split in ``rows`` parts, second in ``columns``."""
    total = 0
    for tensor in tensors:
        shape = list(tensor.shape)
        for dim, parts in ((0, rows), (1, columns)):
            if dim < len(shape):
                shape[dim] = -(-shape[dim] // parts)
        total += torch.Size(shape).numel() * tensor.element_size()
    return total
