"""Checkpoints of a strategy: folders to which each rank writes its part, now or while training goes on."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch.optim import Optimizer

from memlm.errors import ConfigError
from memlm.parallel import checkpoint_folder
from memlm.parallel.background_save import BackgroundSave
from memlm.parallel.folder_swap import remove

_ASYNCHRONOUS_KEY = "trainer.strategy.init_args.asynchronous_save"
_GRACE = 10.0
"""Seconds that a checkpoint which is being written is given after an error."""


class FolderCheckpoints(ParallelStrategy):
    """Saves and loads by :mod:`memlm.parallel.checkpoint_folder`; a base of a strategy.

    Args:
        save_distributed_checkpoint: See :class:`memlm.parallel.strategy.MemoryParallelStrategy`.
        asynchronous_save: See there.
        **others: Of the next base.
    """

    def __init__(self, save_distributed_checkpoint: bool, asynchronous_save: bool, **others: Any) -> None:
        super().__init__(**others)
        if asynchronous_save and not save_distributed_checkpoint:
            raise ConfigError(
                _ASYNCHRONOUS_KEY, "is true, which needs save_distributed_checkpoint: true, that is false"
            )
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.asynchronous_save = asynchronous_save
        self._save_group: dist.ProcessGroup | None = None
        self._saving: BackgroundSave | None = None

    def prepare_saving(self) -> None:
        """Once processes have started; every rank must call this."""
        if self.asynchronous_save:  # which takes place beside the collectives of training
            self._save_group = dist.new_group(backend="gloo")

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
        if self.asynchronous_save:
            snapshot = checkpoint_folder.Snapshot(checkpoint, copy=True)
            self._saving = BackgroundSave(partial(snapshot.write, path, self._save_group))
            return
        if self.save_distributed_checkpoint:
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

    def end_saving(self, exception: BaseException) -> None:
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
        """Remove a checkpoint, a file or a folder, once the latest, which may replace it, is in place."""
        self.when_saved(partial(remove, Path(filepath)))
