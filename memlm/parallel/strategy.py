"""The strategies that split value tables over memory groups; they differ in what becomes of the rest.

That of DeepSpeed is :mod:`memlm.parallel.deepspeed_strategy`, which this registers too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, cast

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from memlm.parallel import deepspeed_strategy as deepspeed_strategy
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
        expert_group: Ranks that share one copy of the experts, each with some of them: tokens go to their
            experts' ranks and come back. Divides the number of ranks and of experts; null: all ranks.
            Default: each rank gathers all experts of a block, as it does the other parameters.
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each rank writes; a single file
            is written by rank 0, which then needs memory for the whole model.
        asynchronous_save: Whether training goes on while a checkpoint is written, from a copy in the memory
            of the CPU. The next save, and the end of training, wait for it.
        wire_dtype: What the weights, answers and row gradients that memory sends travel as, where they are
            wider; sums are added up in fp32. Default: as they are.
        process_group_backend: gloo, nccl; default: by device.
        timeout: After which a collective that some rank does not join fails.
        whole_gradients: Whether each rank adds up the whole dense gradients of accumulated micro-batches, and
            sends them once a step. Otherwise it keeps only its part, and sends them after every micro-batch:
            less memory, more traffic. Without accumulation it makes no difference.
    """

    shards_dense = True

    def __init__(
        self,
        memory_group: int | None = None,
        expert_group: int | None = 1,
        save_distributed_checkpoint: bool = True,
        asynchronous_save: bool = False,
        wire_dtype: Literal["bfloat16"] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        whole_gradients: bool = True,
    ) -> None:
        super().__init__(
            memory_group,
            save_distributed_checkpoint,
            asynchronous_save,
            wire_dtype,
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.expert_group = expert_group
        self.whole_gradients = whole_gradients

    @property
    def expert_group_size(self) -> int:
        """Ranks that share one copy of the experts; known before processes have started."""
        return self.ranks if self.expert_group is None else self.expert_group

    def setup_environment(self) -> None:
        """Start the processes' communication."""
        self._data_parallel_size = self.ranks
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it backward passes add gradients up, and send none: of all micro-batches but the last."""
        split = [m for m in cast(nn.Module, self.model).modules() if isinstance(m, FSDPModule)]
        for module in split:
            module.set_requires_gradient_sync(not self.whole_gradients, recurse=False)
        try:
            yield
        finally:
            for module in split:
                module.set_requires_gradient_sync(True, recurse=False)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self.meet()  # before there is a mesh, which other ranks may not make


class MemoryDDPStrategy(MemoryStrategy, DDPStrategy):
    """Every rank has the whole model, unless ``memory_group`` splits the value tables.

    Dense gradients are averaged (DDP), rows exchanged. The optimizer's state of the values is split over all
    ranks.

    Args:
        memory_group: G: ranks that share one copy of the values; null: all. Default: each rank has its own.
        save_distributed_checkpoint: See :class:`MemoryParallelStrategy`.
        asynchronous_save: See there.
        wire_dtype: See there.
        **others: Of Lightning's DDPStrategy, and of torch's DistributedDataParallel.
    """

    def __init__(
        self,
        memory_group: int | None = 1,
        save_distributed_checkpoint: bool = True,
        asynchronous_save: bool = False,
        wire_dtype: Literal["bfloat16"] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(memory_group, save_distributed_checkpoint, asynchronous_save, wire_dtype, **others)

    def setup_distributed(self) -> None:
        """Start the processes' communication."""
        super().setup_distributed()
        self.meet()

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
