"""Splits the experts of a model over groups of ranks; FSDP2 then splits each part over the groups."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from memlm.errors import ConfigError
from memlm.parallel.expert_exchange import ExpertExchange
from memlm.transformer import Transformer
from memlm.transformer.mixture_of_experts import MixtureOfExperts

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

EXPERT_KEY = "trainer.strategy.init_args.expert_group"
REPLICAS, GROUP = "expert_replicas", "expert_group"


def expert_dimension(shape: Sequence[int], replicas: int) -> int | None:
    """Along which dimension the experts ``[E / G, ...]`` of a rank are split over the groups that have them.

    Not the first, over which the group splits already. FSDP2 splits others evenly alone; None if none does.
    """
    return next((dim for dim in range(1, len(shape)) if shape[dim] % replicas == 0), None)


def split_experts(model: Transformer, group_size: int) -> dict[int, nn.Parameter]:
    """The parameters that are split over groups of a size, by their ``id``; none for groups of one rank."""
    if group_size == 1:
        return {}
    return {
        id(matrices): matrices for layer in model.experts.values() for matrices in (layer.gate_up, layer.down)
    }


def check_experts(model: Transformer, ranks: int, group_size: int, key: str) -> None:
    """Check that the experts of all layers divide over groups of ranks.

    Args:
        model: On any device, not yet split.
        ranks: ``W``.
        group_size: Ranks of a group; 1: experts are not split.
        key: YAML key of the group size, for messages.

    Raises:
        ConfigError: The group does not divide the ranks or the experts, there are no experts, or what a rank
            holds of them does not divide over the groups.
    """
    if group_size < 1 or ranks % group_size:
        raise ConfigError(key, f"is {group_size}, must divide the number of processes ({ranks})")
    if group_size == 1:
        return
    if not model.experts:
        raise ConfigError(key, f"is {group_size}, but the model has no experts (model.moe)")
    for index, layer in model.experts.items():
        experts = layer.config.experts
        if experts % group_size:
            raise ConfigError(key, f"is {group_size}, must divide the {experts} experts of block {index}")
        for matrices in (layer.gate_up, layer.down):
            if expert_dimension(matrices.shape, ranks // group_size) is None:
                _, rows, columns = matrices.shape
                raise ConfigError(
                    key,
                    f"is {group_size}, which leaves {ranks // group_size} groups of {ranks} processes to "
                    f"split each expert; their number must divide {rows} or {columns} (block {index})",
                )


class ExpertMesh:
    """Ranks in groups of ``G``, neighbours in one; each group has every expert once.

    It has axes of its own: experts and value tables may be split over groups of different sizes, and some
    models have either alone.

    Args:
        device_type: ``cpu`` or ``cuda``.
        ranks: ``W``, all of them.
        group_size: ``G``; divides it.

    Attributes:
        mesh: Two axes: the groups, and the places in a group.
    """

    def __init__(self, device_type: str, ranks: int, group_size: int) -> None:
        shape = (ranks // group_size, group_size)
        self.mesh: DeviceMesh = init_device_mesh(device_type, shape, mesh_dim_names=(REPLICAS, GROUP))
        # Norms are then summed over all ranks at once: in two steps, sums may differ from rank to rank.
        self.mesh._flatten("expert_ranks")
        self._parts: set[nn.Parameter] = set()

    def split(self, layer: MixtureOfExperts) -> None:
        """Leave a layer this rank's experts."""
        group = self.mesh[GROUP]
        for name in ("gate_up", "down"):
            whole = getattr(layer, name)
            count = whole.shape[0] // group.size()
            first = group.get_local_rank() * count
            held = whole.detach()[first : first + count].clone()
            part = DTensor.from_local(
                held, group, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            parameter = nn.Parameter(part, requires_grad=whole.requires_grad)
            setattr(layer, name, parameter)
            self._parts.add(parameter)
        layer.exchange = ExpertExchange(group.get_group())

    def placement(
        self, others: Callable[[nn.Parameter], Shard]
    ) -> "Callable[[nn.Parameter], Shard | ShardPlacementResult]":
        """For ``fully_shard``: the experts are split over the groups, any other parameter as ``others`` says.

        Split over the groups along another dimension than that of the experts, each part is a plain block of
        the whole, which any reader of a checkpoint understands.
        """
        # A parameter's own mesh is younger than the rest of FSDP2: only who splits experts needs it.
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

        replicas = FSDPMeshInfo(self.mesh[REPLICAS], shard_mesh_dim=0)

        def place(parameter: nn.Parameter) -> Any:
            if parameter not in self._parts:
                return others(parameter)
            dimension = expert_dimension(parameter.shape, self.mesh.size(0))
            assert dimension is not None, "check_experts was not called"
            return ShardPlacementResult(Shard(dimension), replicas)

        return place
