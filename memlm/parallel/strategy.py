"""The Lightning strategy that splits value tables over memory groups, and the rest by FSDP2."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from memlm.errors import ConfigError
from memlm.parallel import checkpoint_folder
from memlm.parallel.folder_swap import remove
from memlm.parallel.mesh import MemoryMesh, memory_mesh
from memlm.parallel.watch import Watch

GROUP_KEY = "trainer.strategy.memory_group"


class MemoryParallelStrategy(ModelParallelStrategy):
    """Ranks in groups, each of which has every value table once, split along the value dim.

    The other parameters, their gradients and moments are split over all ranks (FSDP2). Checkpoints are
    folders of torch.distributed.checkpoint, to which each rank writes its part, unless
    ``save_distributed_checkpoint`` is false.

    Args:
        memory_group: G: ranks that share one copy of the values; divides their number and every value dim.
            Default: all ranks. More of them take less memory each, and send more.
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each rank writes; a single file
            is written by rank 0, which then needs memory for the whole model.
        process_group_backend: gloo, nccl; default: by device.
        timeout: After which a collective that some rank does not join fails.
    """

    def __init__(
        self,
        memory_group: int | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.memory_group = memory_group
        self._memory_mesh: MemoryMesh | None = None
        self._watch: Watch | None = None

    @property
    def memory_mesh(self) -> MemoryMesh:
        """Of the value tables; once processes have started."""
        assert self._memory_mesh is not None
        return self._memory_mesh

    @property
    def group_size(self) -> int:
        """``G``, ranks in a group; known before processes have started.

        Raises:
            ConfigError: It does not divide the number of ranks.
        """
        ranks = self.num_nodes * self.num_processes
        group = ranks if self.memory_group is None else self.memory_group
        if group < 1 or ranks % group:
            raise ConfigError(GROUP_KEY, f"is {group}, must divide the number of processes ({ranks})")
        return group

    def setup_environment(self) -> None:
        """Start the processes' communication."""
        ranks, group = self.num_nodes * self.num_processes, self.group_size
        self._data_parallel_size = ranks
        super().setup_environment()
        self._memory_mesh = memory_mesh(self.root_device.type, ranks, group, GROUP_KEY)
        if ranks > 1 and self._watch is None:
            place = self.cluster_environment
            assert place is not None
            self._watch = Watch(self.global_rank, ranks, place.main_address, place.main_port)

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank's end has caused this one's, if one has."""
        super().on_exception(exception)
        if self._watch is not None and isinstance(exception, Exception):
            cause = self._watch.explain(exception)
            if cause is not None:
                print(f"memlm: rank {self.global_rank} ends: {cause}", file=sys.stderr, flush=True)

    def teardown(self) -> None:
        """End the watch over the other ranks, too."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        super().teardown()

    # -- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's part of the model's state, without a copy."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part of the optimizer's state, without a copy, by the parameters' names."""
        assert self.lightning_module is not None
        inner: Any = getattr(optimizer, "optimizer", optimizer)
        return checkpoint_folder.optimizer_state(self.lightning_module, inner)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, each rank its part; it takes its name when it is whole."""
        path = Path(self.broadcast(str(filepath)))
        if self._save_distributed_checkpoint:
            checkpoint_folder.save(checkpoint, path)
            return
        whole = checkpoint_folder.save_file(checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path, storage_options)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this rank's part of a checkpoint of any number of ranks, or of a single device."""
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        optimizers: list[Any] = [getattr(own, "optimizer", own) for own in self.optimizers]
        return checkpoint_folder.load(
            path, self.lightning_module, optimizers, weights_only is None or weights_only
        )

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, a file or a folder."""
        if self.is_global_zero:
            remove(Path(filepath))


StrategyRegistry.register(
    "memory_parallel",
    MemoryParallelStrategy,
    description="value tables split over memory groups, all else by FSDP2",
)


def is_memory_parallel(strategy: Any) -> bool:
    """Whether what a config says of the Trainer's strategy means this one."""
    if isinstance(strategy, str):
        return strategy == "memory_parallel"
    return str(getattr(strategy, "class_path", "")).endswith(f".{MemoryParallelStrategy.__name__}")
