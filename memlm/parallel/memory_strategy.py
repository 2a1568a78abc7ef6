"""What strategies share under which value tables are split over memory groups: mesh, watch, checkpoints."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim import Optimizer

from memlm.errors import ConfigError, is_users, line_of
from memlm.optim import MemoryAdamW
from memlm.parallel import checkpoint_folder
from memlm.parallel.agreement import agree, claims_of
from memlm.parallel.background_save import BackgroundSave
from memlm.parallel.ending import Ending
from memlm.parallel.folder_swap import remove
from memlm.parallel.mesh import MemoryMesh, memory_mesh
from memlm.parallel.placing import place
from memlm.parallel.watch import Watch
from memlm.transformer import Transformer

GROUP_KEY = "trainer.strategy.memory_group"
_ASYNCHRONOUS_KEY = "trainer.strategy.asynchronous_save"
_GRACE = 10.0
"""Seconds that a checkpoint which is being written is given after an error."""


class MemoryStrategy(ParallelStrategy):
    """Ranks in groups, each of which has every value table once, split along the value dim.

    Goes first among the bases of a strategy, whose other base spreads the rest of the model. Checkpoints are
    folders of torch.distributed.checkpoint, to which each rank writes its part.

    Args:
        memory_group: See :class:`memlm.parallel.strategy.MemoryParallelStrategy`.
        save_distributed_checkpoint: See there.
        asynchronous_save: See there.
        **others: Of the other base.
    """

    shards_dense = False
    """Whether :meth:`place` splits the dense parameters too (FSDP2)."""
    optimizer_class: type[MemoryAdamW] = MemoryAdamW
    """Of the optimizer that the model makes."""

    def __init__(
        self,
        memory_group: int | None = None,
        save_distributed_checkpoint: bool = True,
        asynchronous_save: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        if asynchronous_save and not save_distributed_checkpoint:
            raise ConfigError(
                _ASYNCHRONOUS_KEY, "is true, which needs save_distributed_checkpoint: true, that is false"
            )
        self.memory_group = memory_group
        self._one_folder = save_distributed_checkpoint
        self._asynchronous_save = asynchronous_save
        self._save_group: dist.ProcessGroup | None = None
        self._saving: BackgroundSave | None = None
        self._ending: Ending | None = None
        self._memory_mesh: MemoryMesh | None = None
        self._watch: Watch | None = None
        self.run_config: dict[str, Any] = {}
        """Dotted keys of a configuration, in which all ranks must agree; set by the command line."""

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
        self._check_launcher()
        group = self.ranks if self.memory_group is None else self.memory_group
        if group < 1 or self.ranks % group:
            raise ConfigError(GROUP_KEY, f"is {group}, must divide the number of processes ({self.ranks})")
        return group

    def _check_launcher(self) -> None:
        """Check that as many processes as the Trainer wants are those that torchrun or SLURM has started."""
        environment = self.cluster_environment
        if environment is None or not environment.creates_processes_externally:
            return
        kind = type(environment).__name__.removesuffix("Environment")
        launcher = {"TorchElastic": "torchrun"}.get(kind, kind)
        devices, nodes = self.num_processes, self.num_nodes  # type: ignore[attr-defined]
        here = int(os.environ.get("LOCAL_WORLD_SIZE", devices)) if launcher == "torchrun" else devices
        if (started := environment.world_size()) != self.ranks or here != devices:
            raise ConfigError(
                "trainer.devices",
                f"is {devices}, and trainer.num_nodes {nodes}, which makes {self.ranks} processes; "
                f"{launcher} has started {started}"
                + (f", {here} on this node" if launcher == "torchrun" else ""),
            )
        try:
            environment.validate_settings(devices, nodes)
        except ValueError as error:
            raise ConfigError("trainer.devices", str(error)) from error

    @property
    def expert_group_size(self) -> int:
        """Ranks that share one copy of the experts; 1 where they are spread as the other parameters are."""
        return 1

    @property
    def needs_all_ranks(self) -> bool:
        """Whether no rank can run the model without the others."""
        return self.ranks > 1 and (self.shards_dense or self.group_size > 1)

    def setup_environment(self) -> None:
        """Start the processes' communication."""
        group = self.group_size
        environment = self.cluster_environment
        assert environment is not None
        try:
            super().setup_environment()
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise ConfigError(
                "trainer.num_nodes",
                f"is {self.num_nodes}: {self.ranks} processes were to meet "  # type: ignore[attr-defined]
                f"at {environment.main_address}:{environment.main_port}, but {str(error).splitlines()[0]}",
            ) from error
        self.meet()
        self._memory_mesh = memory_mesh(self.root_device.type, self.ranks, group, GROUP_KEY)
        if self._asynchronous_save:  # which takes place beside the collectives of training
            self._save_group = dist.new_group(backend="gloo")

    def meet(self) -> None:
        """Once all ranks have come, before they make anything together: see that they were started alike.

        Raises:
            ConfigError: On all ranks: they were not.
        """
        environment, module = self.cluster_environment, self.lightning_module
        assert environment is not None and module is not None
        if self.ranks == 1 or self._watch is not None:
            return
        self._watch = Watch(self.global_rank, self.ranks, environment.main_address, environment.main_port)
        agree(
            self._watch.meeting_place(),
            self.global_rank,
            self.ranks,
            lambda: claims_of(module.trainer, self, self.run_config),
            getattr(self, "_timeout", None) or timedelta(minutes=30),
        )

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
            expert_group=self.expert_group_size,
        )

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank's end has caused this one's, if one has; what all refuse is said by one of them."""
        super().on_exception(exception)
        self._end_saving(exception)
        if isinstance(exception, SIGTERMException) and self._watch is not None:
            self._watch.stop()  # its store goes with the first rank
            self._let_first_rank_end()
        if self._watch is None or not isinstance(exception, Exception):
            return
        said: Any = exception
        if is_users(exception):
            if self._watch.refuse(line := line_of(exception)):
                print(line, file=sys.stderr, flush=True)
            said.exit_code = 2
            self._let_first_rank_end()
        elif self._watch.refused():
            said.exit_code = 2
        elif (cause := self._watch.explain(exception)) is not None:
            print(f"memlm: rank {self.global_rank} ends: {cause}", file=sys.stderr, flush=True)
            said.exit_code = 1

    def _let_first_rank_end(self) -> None:
        # Lightning kills the process that has started this one, if this one is the first to end.
        parent, until = os.getppid(), time.monotonic() + 10
        if isinstance(self.cluster_environment, LightningEnvironment) and self.local_rank != 0:
            while os.getppid() == parent and time.monotonic() < until:
                time.sleep(0.05)

    def ends(self, wanted: bool) -> bool:
        """Whether training ends after this batch, or was to; every rank must ask after every batch.

        Args:
            wanted: Whether this rank has been told to end: then all of them end, after the same batch.
        """
        if self._watch is None:
            return wanted
        if self._ending is None:
            self._ending = Ending(dist.PrefixStore("ending", self._watch.meeting_place()))
        return self._ending.agreed(wanted)

    def teardown(self) -> None:
        """End what is being saved, and the watch over the other ranks, too."""
        self.finish_saving()
        self._ending = None
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        module = self.lightning_module
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            self._lightning_module = None  # the run ends before tables are made: they cannot be moved
        try:
            super().teardown()
        finally:
            self._lightning_module = module

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
        """Write a checkpoint, each rank its part; it takes its name when it is whole.

        Where saving is asynchronous, this copies what is to be written, and returns.
        """
        path = Path(self.broadcast(str(filepath)))
        self.finish_saving()
        if self._asynchronous_save:
            snapshot = checkpoint_folder.Snapshot(checkpoint, copy=True)
            self._saving = BackgroundSave(partial(snapshot.write, path, self._save_group))
            return
        if self._one_folder:
            checkpoint_folder.save(checkpoint, path)
            return
        whole = checkpoint_folder.save_file(checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path, storage_options)
        self.barrier()

    def when_saved(self, action: Callable[[], None]) -> None:
        """Do something on rank 0 once the latest checkpoint is in place: now, or from another thread."""
        if not self.is_global_zero:
            return
        if self._saving is None:
            action()
        else:
            self._saving.then(action)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if one is; every rank must call this.

        Raises:
            CheckpointError: It could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.wait()

    def _end_saving(self, exception: BaseException) -> None:
        """Wait for it before this process ends; after an error not for long, and whatever becomes of it."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.wait(_GRACE if isinstance(exception, Exception) else None)
        except Exception as error:
            print(f"memlm: rank {self.global_rank}: {error}", file=sys.stderr, flush=True)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this rank's part of a checkpoint of any number of ranks, or of a single device."""
        path = Path(self.broadcast(str(checkpoint_path)))
        self.finish_saving()
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
        # Its own get makes the strategy.
        kind = dict.get(StrategyRegistry, strategy, {}).get("strategy")
        return isinstance(kind, type) and issubclass(kind, MemoryStrategy)
    name = str(getattr(strategy, "class_path", "")).rsplit(".", 1)[-1]
    return any(kind.__name__ == name for kind in _subclasses(MemoryStrategy))


def _subclasses(kind: type) -> set[type]:
    own: set[type] = set(kind.__subclasses__())
    return own.union(*map(_subclasses, own))
