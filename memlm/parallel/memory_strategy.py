"""What strategies share under which value tables are split over memory groups: mesh, watch, checkpoints."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from torch import nn
from torch.optim import Optimizer

from memlm.errors import ConfigError
from memlm.parallel import checkpoint_folder
from memlm.parallel.folder_swap import remove
from memlm.parallel.mesh import MemoryMesh, memory_mesh
from memlm.parallel.placing import place
from memlm.parallel.watch import Watch
from memlm.transformer import Transformer

GROUP_KEY = "trainer.strategy.memory_group"


class MemoryStrategy(ParallelStrategy):
    """Ranks in groups, each of which has every value table once, split along the value dim.

    Goes first among the bases of a strategy, whose other base spreads the rest of the model. Checkpoints are
    folders of torch.distributed.checkpoint, to which each rank writes its part.

    Args:
        memory_group: See :class:`memlm.parallel.strategy.MemoryParallelStrategy`.
        save_distributed_checkpoint: See there.
        **others: Of the other base.
    """

    shards_dense = False
    """Whether :meth:`place` splits the dense parameters too (FSDP2)."""

    def __init__(
        self, memory_group: int | None = None, save_distributed_checkpoint: bool = True, **others: Any
    ) -> None:
        super().__init__(**others)
        self.memory_group = memory_group
        self._one_folder = save_distributed_checkpoint
        self._memory_mesh: MemoryMesh | None = None
        self._watch: Watch | None = None

    @property
    def memory_mesh(self) -> MemoryMesh:
        """Of the value tables; once processes have started."""
        assert self._memory_mesh is not None
        return self._memory_mesh

    @property
    def ranks(self) -> int:
        """Number of processes; known before they have started."""
        return int(self.num_nodes * self.num_processes)  # type: ignore[attr-defined]

    @property
    def group_size(self) -> int:
        """``G``, ranks in a group; known before processes have started.

        Raises:
            ConfigError: It does not divide the number of ranks.
        """
        group = self.ranks if self.memory_group is None else self.memory_group
        if group < 1 or self.ranks % group:
            raise ConfigError(GROUP_KEY, f"is {group}, must divide the number of processes ({self.ranks})")
        return group

    def setup_environment(self) -> None:
        """Start the processes' communication."""
        group = self.group_size
        super().setup_environment()
        self._memory_mesh = memory_mesh(self.root_device.type, self.ranks, group, GROUP_KEY)
        if self.ranks > 1 and self._watch is None:
            environment = self.cluster_environment
            assert environment is not None
            self._watch = Watch(self.global_rank, self.ranks, environment.main_address, environment.main_port)

    def place(self, model: Transformer) -> None:
        """Give this rank its part of a model, in place, in the dtype of the Trainer's precision."""
        # The plugin itself would come too late: tables are made in the dtype that they shall have.
        probe = self.precision_plugin.convert_module(nn.Linear(1, 1, device="meta"))
        dtype = next(probe.parameters()).dtype
        place(
            model,
            self.memory_mesh,
            self.root_device,
            dtype=None if dtype == torch.float32 else dtype,
            shard_dense=self.shards_dense,
        )

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

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Yes: a rank reads its part into the tensors that it has."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """No: :meth:`load_checkpoint` does."""
        return False

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
        if self._one_folder:
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

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Nothing: :meth:`load_checkpoint` has filled the model."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Nothing: :meth:`load_checkpoint` has filled the optimizer's state."""

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, a file or a folder."""
        if self.is_global_zero:
            remove(Path(filepath))


def splits_memory(strategy: Any) -> bool:
    """Whether what a config says of the Trainer's strategy means one of these."""
    if isinstance(strategy, str):
        known: Any = StrategyRegistry.get(strategy, {})
        kind = known.get("strategy") if isinstance(known, dict) else None
        return isinstance(kind, type) and issubclass(kind, MemoryStrategy)
    name = str(getattr(strategy, "class_path", "")).rsplit(".", 1)[-1]
    return any(kind.__name__ == name for kind in _subclasses(MemoryStrategy))


def _subclasses(kind: type) -> set[type]:
    own: set[type] = set(kind.__subclasses__())
    return own.union(*map(_subclasses, own))
