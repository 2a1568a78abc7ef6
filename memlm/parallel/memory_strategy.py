"""What strategies share under which value tables are split over memory groups."""

import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from memlm.errors import ConfigError, is_users, line_of
from memlm.optim import MemoryAdamW
from memlm.parallel.agreement import agree, claims_of
from memlm.parallel.ending import Ending
from memlm.parallel.folder_checkpoints import FolderCheckpoints
from memlm.parallel.launcher import check_launcher
from memlm.parallel.mesh import MemoryMesh, memory_mesh
from memlm.parallel.placing import place
from memlm.parallel.watch import Watch
from memlm.transformer import Transformer

GROUP_KEY = "trainer.strategy.init_args.memory_group"


class MemoryStrategy(FolderCheckpoints):
    """Ranks in groups, each of which has every value table once, split along the value dim.

    Goes first among the bases of a strategy, whose other base spreads the rest of the model. Checkpoints are
    folders of torch.distributed.checkpoint, to which each rank writes its part.

    Args:
        memory_group: See :class:`memlm.parallel.strategy.MemoryParallelStrategy`.
        save_distributed_checkpoint: See there.
        asynchronous_save: See there.
        wire_dtype: See there.
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
        wire_dtype: Literal["bfloat16"] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(save_distributed_checkpoint, asynchronous_save, **others)
        self.memory_group = memory_group
        self.wire_dtype = wire_dtype
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
        if self.cluster_environment is not None:
            check_launcher(self.cluster_environment, self.num_processes, self.num_nodes)  # type: ignore[attr-defined]
        group = self.ranks if self.memory_group is None else self.memory_group
        if group < 1 or self.ranks % group:
            raise ConfigError(GROUP_KEY, f"is {group}, must divide the number of processes ({self.ranks})")
        return group

    @property
    def expert_group_size(self) -> int:
        """Ranks that share one copy of the experts; 1 where they are spread as the other parameters are."""
        return 1

    @property
    def needs_all_ranks(self) -> bool:
        """Whether no rank can run the model without the others."""
        return self.ranks > 1 and (self.shards_dense or self.group_size > 1)

    def whole_between_passes(self) -> AbstractContextManager[Any]:
        """Within it parts of the model can be called at will between forward passes of the whole.

        All ranks must enter it.
        """
        return nullcontext()  # FSDP2's outermost parameters, the output layer's among them, stay whole

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
        self.prepare_saving()

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
            wire_dtype=torch.bfloat16 if self.wire_dtype else None,
        )

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank's end has caused this one's, if one has; what all refuse is said by one of them."""
        super().on_exception(exception)
        self.end_saving(exception)
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
