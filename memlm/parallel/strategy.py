"""The strategies that split value tables over memory groups; they differ in what becomes of the rest."""

from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from memlm.parallel.memory_strategy import MemoryStrategy
from memlm.transformer import Transformer


class MemoryParallelStrategy(MemoryStrategy, ModelParallelStrategy):
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

    shards_dense = True

    def __init__(
        self,
        memory_group: int | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            memory_group,
            save_distributed_checkpoint,
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Start the processes' communication."""
        self._data_parallel_size = self.ranks
        super().setup_environment()


class MemoryDDPStrategy(MemoryStrategy, DDPStrategy):
    """Every rank has the whole model, unless ``memory_group`` splits the value tables.

    Dense gradients are averaged (DDP), rows exchanged. The optimizer's state of the values is split over all
    ranks.

    Args:
        memory_group: G: ranks that share one copy of the values; null: all. Default: each rank has its own.
        save_distributed_checkpoint: See :class:`MemoryParallelStrategy`.
        **others: Of Lightning's DDPStrategy, and of torch's DistributedDataParallel.
    """

    def __init__(
        self, memory_group: int | None = 1, save_distributed_checkpoint: bool = True, **others: Any
    ) -> None:
        super().__init__(memory_group, save_distributed_checkpoint, **others)

    def place(self, model: Transformer) -> None:
        """Give this rank its part of a model, in place."""
        super().place(model)
        module = self.lightning_module
        assert module is not None
        tables = [name for name, _ in module.named_parameters() if name.endswith(".values")]
        # Their gradient is none of DDP's business, and their parts differ from rank to rank.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, tables)


StrategyRegistry.register(
    "memory_parallel",
    MemoryParallelStrategy,
    description="value tables split over memory groups, all else by FSDP2",
)
StrategyRegistry.register(
    "memory_ddp", MemoryDDPStrategy, description="the whole model on each rank, rows exchanged"
)
