"""Which ranks hold which part of a value table."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from memlm.errors import ConfigError

REPLICAS, GROUP = "memory_replicas", "memory_group"


@dataclass(frozen=True)
class MemoryMesh:
    """Ranks in groups of ``G``: a group has each value table once, split along the value dim.

    Neighbouring ranks form a group. Ranks of the same place in their groups hold the same columns: they are
    replicas of one another, and share the optimizer's state, a block of rows each.
    """

    mesh: DeviceMesh
    """Two axes: the groups, and the places in a group."""

    @property
    def group(self) -> dist.ProcessGroup:
        """This rank's group."""
        return self.mesh.get_group(GROUP)

    @property
    def replicas(self) -> dist.ProcessGroup:
        """The ranks that hold the same columns as this one."""
        return self.mesh.get_group(REPLICAS)

    @property
    def group_size(self) -> int:
        """``G``: ranks in a group."""
        return self.mesh.size(1)

    @property
    def groups(self) -> int:
        """Number of groups, and of replicas of each column."""
        return self.mesh.size(0)

    @property
    def place(self) -> int:
        """Place of this rank in its group."""
        return self.mesh.get_local_rank(GROUP)

    @property
    def replica(self) -> int:
        """Which group this rank belongs to."""
        return self.mesh.get_local_rank(REPLICAS)


def memory_mesh(device_type: str, world_size: int, group_size: int, key: str) -> MemoryMesh:
    """The mesh of all ranks in groups of a size.

    Args:
        device_type: ``cpu`` or ``cuda``.
        world_size: Number of ranks.
        group_size: ``G``; divides it.
        key: YAML key of the group size, for messages.

    Raises:
        ConfigError: The group size does not divide the number of ranks.
    """
    if group_size < 1 or world_size % group_size:
        raise ConfigError(key, f"is {group_size}, must divide the number of processes ({world_size})")
    shape = (world_size // group_size, group_size)
    return MemoryMesh(init_device_mesh(device_type, shape, mesh_dim_names=(REPLICAS, GROUP)))
