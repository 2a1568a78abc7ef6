"""Splits the value tables of a model over a memory group, and the rest over all ranks."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from memlm.errors import ConfigError
from memlm.memory import MemoryPool
from memlm.parallel.batch_norm import synchronise
from memlm.parallel.dense_split import split_dimension
from memlm.parallel.expert_split import EXPERT_KEY, ExpertMesh, check_experts
from memlm.parallel.group_exchange import GroupExchange
from memlm.parallel.mesh import MemoryMesh
from memlm.parallel.row_exchange import RowExchange
from memlm.transformer import Transformer
from memlm.transformer.initialization import initialise


def check_pools(model: Transformer, group_size: int, key: str) -> None:
    """Check that the columns of all value tables divide over a group.

    Raises:
        ConfigError: Names the group size's key, and the pool.
    """
    for name, pool in model.pools.items():
        value_dim = cast(MemoryPool, pool).value_dim
        if value_dim % group_size:
            raise ConfigError(
                key, f"is {group_size}, must divide the {value_dim} elements of a value of pool {name!r}"
            )


@torch.no_grad()
def place(
    model: Transformer,
    mesh: MemoryMesh,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    shard_dense: bool = True,
    expert_group: int = 1,
    wire_dtype: torch.dtype | None = None,
) -> None:
    """Give each rank its part of a model, in place.

    Args:
        model: The same on all ranks. Made within :func:`memlm.memory.pool.values_without_memory`, it draws
            the initial values that it would have had, those of the first rank; no rank then ever holds a
            whole table. A GPU draws them itself: others than a CPU, but the same for any number of ranks.
        mesh: Of the value tables.
        device: Where to.
        dtype: Of all parameters from now on; default: each keeps its own.
        shard_dense: Whether the other parameters are split over all ranks (FSDP2).
        expert_group: Ranks that share one copy of the experts, each with some of them; goes with
            ``shard_dense``.
        wire_dtype: What the memory's wider floating-point numbers travel as; default: as they are.

    Raises:
        ConfigError: See :func:`memlm.parallel.expert_split.check_experts`.
    """
    check_experts(model, mesh.mesh.size(), expert_group, EXPERT_KEY)
    pools = cast(dict[str, MemoryPool], dict(model.pools.items()))
    for pool in pools.values():
        _split(pool, mesh, device, dtype)
        _connect(pool, mesh, wire_dtype)
    model.to(device)
    if model.drawn_from is not None:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else ()):
            _draw_alike(model.drawn_from, device)
            initialise(model)
        model.drawn_from = None
    if dtype is not None:  # drawn in the dtypes of a model on one device, which is converted later, too
        model.to(dtype)
    synchronise(model)
    if shard_dense:
        _shard(model, mesh.mesh, [pool.values for pool in pools.values()], expert_group)


def _draw_alike(state: Tensor, device: torch.device) -> None:
    """Have all ranks draw what the first one does, whether or not they have been seeded alike.

    Args:
        state: Of this rank's generator of the CPU.
        device: Whose generator draws.
    """
    state = state.to(device)
    dist.broadcast(state, 0)
    torch.set_rng_state(state.cpu())
    if device.type == "cuda":
        torch.cuda.manual_seed(int(torch.randint(2**62, ())))


def _split(pool: MemoryPool, mesh: MemoryMesh, device: torch.device, dtype: torch.dtype | None) -> None:
    """Leave a pool this rank's columns of its values."""
    values = pool.values
    width = pool.value_dim // mesh.group_size
    if values.is_meta:
        table = torch.empty(pool.slots, width, dtype=dtype or values.dtype, device=device)
    else:
        first = mesh.place * width
        table = values.detach()[:, first : first + width].to(device, dtype, copy=True)
    whole = DTensor.from_local(
        table,
        mesh.mesh,
        [Replicate(), Shard(1)],
        run_check=False,
        shape=values.shape,
        stride=(pool.value_dim, 1),
    )
    pool.values = nn.Parameter(whole, requires_grad=values.requires_grad)


def _connect(pool: MemoryPool, mesh: MemoryMesh, wire_dtype: torch.dtype | None) -> None:
    """Let it read what other ranks hold, and send them its rows' gradients."""
    pool.exchange = GroupExchange(mesh.group, wire_dtype)
    table, kernels = pool.table.detach(), pool.gradient.kernels
    pool.gradient.merging = RowExchange(table, mesh, kernels, wire_dtype=wire_dtype)


def _shard(model: Transformer, mesh: DeviceMesh, tables: list[nn.Parameter], expert_group: int) -> None:
    """Split all but the value tables over all ranks by FSDP2, a block at a time; experts over groups."""
    ranks = mesh._flatten("ranks") if mesh.ndim > 1 else mesh
    ignored = set(tables)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(split_dimension(parameter.shape, ranks.size()))

    of_blocks: Any = placement
    if expert_group > 1:
        experts = ExpertMesh(mesh.device_type, ranks.size(), expert_group)
        for layer in model.experts.values():
            experts.split(layer)
        of_blocks = experts.placement(placement)
    for block in model.blocks:
        fully_shard(block, mesh=ranks, shard_placement_fn=of_blocks)
    fully_shard(model, mesh=ranks, ignored_params=ignored, shard_placement_fn=placement)
